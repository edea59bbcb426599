"""The compiler's account of a small program has not drifted from what docs/scale.json holds. Needs libtpu, no TPU."""

import dataclasses
import importlib
import importlib.metadata
import json
from pathlib import Path

import jax
import pytest

from instantid_jax.parallel import aot
from instantid_jax.parallel.aot_programs import fsdp_bound
from instantid_jax.training.program import Program
from instantid_jax.training.recipes import load_recipe

BOUND = 19.938
"""GiB."""
ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs/scale.json").read_text(encoding="utf-8"))


def test_every_recorded_case_has_the_figures_that_are_promised() -> None:
    wanted = {"hbm_peak_bytes", "hbm_limit_bytes", "flops", "flops_minimum", "compile_seconds", "estimated_cycles", "collective_bytes"}
    assert RECORDED
    for name, result in RECORDED.items():
        assert wanted <= result.keys(), name
        assert result["fits"] == (result["hbm_peak_bytes"] <= result["hbm_limit_bytes"]) or not result["fits"], name


def test_full_size_training_leaves_nothing_large_whole_and_knows_its_bound() -> None:
    """InstantID on SDXL over 16 devices: the least that must be gathered and summed, and the largest array that is not split."""
    mesh = jax.sharding.AbstractMesh((1, 16, 1), ("data", "fsdp", "tensor"))
    config = load_recipe(str(ROOT / "configs/instantid.py"))
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, global_batch=16))
    program = Program(config, mesh)
    bound, whole = fsdp_bound(program.abstract_state, program.abstract_frozen, "bfloat16", mesh)
    assert bound / 2**30 == pytest.approx(BOUND, rel=1e-3)
    assert whole <= 4 * 2**20
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (program.abstract_state.parameters | program.abstract_frozen).items()}
    way = sum(sizes[name] for name in ("unet", "identitynet", "adapter", "resampler"))
    trained = sum(sizes[name] for name in ("identitynet", "adapter", "resampler"))
    assert 0.96 < bound / (2 * (sum(sizes.values()) + way + trained)) < 1  # small ones stay whole, the text is projected once
    assert fsdp_bound(program.abstract_state, program.abstract_frozen, "float32", mesh)[0] == 2 * bound


def test_wrong_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--topology", "v9:1x1", "--program", "unet"], "no topology known here"),
        (["--topology", "v5e:1x1", "--program", "unet", "--config", "nowhere.py"], "no recipe nowhere.py"),
        (["--topology", "v5e:1x1", "--program", "unet", "--remat", "some"], "remat"),
    ):
        assert aot.main(arguments) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_small_program_has_not_drifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    recorded = RECORDED["small_unet"]
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    if versions != {name: recorded[name] for name in versions}:
        pytest.skip(f"recorded with another compiler; make it anew: python benchmarks/scale.py --only small_unet (now {versions})")
    monkeypatch.chdir(ROOT)
    file = tmp_path / "result.json"
    options = ["--size", "64", "--dtype", "bfloat16", "--config", "configs/portraits_quick.py", "--json", str(file)]
    assert aot.main(["--topology", "v5e:1x1", "--program", "unet", *options]) == 0
    now = json.loads(file.read_text())
    for name in ("hbm_peak_bytes", "flops", "flops_minimum"):
        assert now[name] == pytest.approx(recorded[name], rel=0.02), name
    table = capsys.readouterr().out
    assert "HBM: peak" in table and "roofline" in table


@pytest.mark.parametrize("program", ["train.py --config configs/portraits_quick.py", "sample.py"])
def test_the_command_lines_name_a_wrong_topology(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    name, *options = program.split()
    main = importlib.import_module(name.removesuffix(".py")).main
    assert main([*options, "--aot", "v9:1x1"]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: 'v9:1x1' is no topology known here")
