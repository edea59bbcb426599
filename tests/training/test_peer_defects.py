"""Defects of other trainers that no other test here guards against; docs/training.md has the whole table."""

import ast
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import ResamplerConfig
from instantid_jax.models.resampler import prepare

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "train.py", ROOT / "sample.py"] + [
    file for folder in ("instantid_jax", "convert_weights", "configs", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
]


def test_embeddings_are_normalised_one_by_one():
    config = ResamplerConfig(normalize=True)
    rows = np.random.default_rng(0).normal(size=(3, config.embedding_dim)).astype(np.float32) * np.array([[1], [7], [0.1]], np.float32)
    together = prepare(jnp.asarray(rows), config)
    np.testing.assert_allclose(jnp.linalg.norm(together, axis=-1), config.embedding_dim**0.5, rtol=1e-5)
    for row, wanted in zip(rows, together, strict=True):
        np.testing.assert_allclose(prepare(jnp.asarray(row[None]), config)[0], wanted, rtol=1e-6)
    assert not np.any(prepare(jnp.zeros((1, config.embedding_dim)), config))


def silent(source: str) -> list[int]:
    """Lines of handlers that catch everything and neither raise nor look at what they caught."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            wide = node.type is None or re.search(r"\b(Base)?Exception\b", caught)
            used = node.name and any(isinstance(n, ast.Name) and n.id == node.name for part in node.body for n in ast.walk(part))
            if wide and not used and not any(isinstance(n, ast.Raise) for part in node.body for n in ast.walk(part)):
                found.append(node.lineno)
    return found


def machine_paths(source: str) -> list[str]:
    """Strings that begin with a folder of somebody's machine, as the program sees them: escapes are read, f-strings looked into."""
    nodes = list(ast.walk(ast.parse(source)))
    later = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in later]
    return [text for text in texts if re.match(r"/(home|Users|root|mnt|data)/|[A-Z]:[/\\]", text)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('open("/home/me/x")', ["/home/me/x"]),
        ("open(f'/mnt/{x}')", ["/mnt/"]),
        (r'open("C:\\users\\me")', [r"C:\users\me"]),
        (r'open(r"D:\data")', [r"D:\data"]),
        ('open("E:/data")', ["E:/data"]),
        ("open(f'{folder}/data/{x}')", []),
        (r'print("A:", x, "/data", "http://mnt/", "B:\n")', []),
    ],
)
def test_paths_of_a_machine_are_found(source, found):
    assert machine_paths(source) == found


def test_the_search_finds_what_it_should():
    assert silent("try: f()\nexcept: pass") == [2]
    assert silent("try: f()\nexcept Exception:\n print(1)") == [2]
    assert silent("try: f()\nexcept Exception as e:\n raise ValueError from e") == []
    assert silent("try: f()\nexcept OSError: pass") == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_error_is_swallowed_and_no_machine_is_named(file):
    text = file.read_text(encoding="utf-8")
    assert silent(text) == []
    assert machine_paths(text) == []


def test_the_table_has_fifteen_rows_and_names_tests_that_exist():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("## What other trainers get wrong")[1].splitlines() if line.startswith("| ") and "`test" in line]
    assert len(rows) == 15
    defined = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    for row in rows:
        names = re.findall(r"(test_\w+)`", row)
        assert names and set(names) <= defined, row
