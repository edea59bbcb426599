"""The tokenizer against transformers', against recorded ids, and on texts and folders that do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instantid_jax.text import Tokenizer, TokenizerError, TokenizerWarning, write_default_tokenizers
from instantid_jax.text.vocabulary import default_merges, vocabulary

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDED = json.loads((GOLDEN / "prompt_weighting.json").read_text(encoding="utf-8"))
UNUSUAL = ["NUL \0 inside", "joined 👩‍👩‍👧", "写真 の 人", "tab\tnew\nline", "İstanbul ǅ ß", "a" * 10_000, "؟ שלום ‏ mixed"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden case's two tokenizers and the default ones."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_default_tokenizers(root)
    base = GOLDEN / "dev" / "base"
    return {"dev": base / "tokenizer", "dev2": base / "tokenizer_2", "clip": root / "tokenizer", "clip2": root / "tokenizer_2"}


@pytest.mark.parametrize("name", ["dev", "dev2", "clip", "clip2"])
def test_ids_are_the_recorded_ones(folders, name):
    tokenizer = Tokenizer.from_directory(folders[name])
    rows = RECORDED["tokens_77"][name]
    want = [[value for value, count in runs for _ in range(count)] for _, runs in rows]
    got = tokenizer.encode([text for text, _ in rows])
    assert len(rows) >= 90
    assert got.dtype == np.int32 and got.shape == (len(rows), 77)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["clip", "clip2"])
def test_ids_are_those_of_transformers(folders, name):
    from transformers import CLIPTokenizer

    oracle = CLIPTokenizer.from_pretrained(folders[name])
    tokenizer = Tokenizer.from_directory(folders[name])
    for text in [*UNUSUAL, *(prompt for prompt, _ in RECORDED["parse"])]:
        want = oracle(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert tokenizer.encode([text])[0].tolist() == want, text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)


def test_default_vocabulary_is_clips(folders):
    tokens = vocabulary(default_merges())
    assert len(tokens) == 49408
    assert json.loads((folders["clip"] / "vocab.json").read_text(encoding="utf-8")) == tokens
    assert (folders["clip"] / "merges.txt").stat().st_size == 524_619  # the size of the published file
    known = {"!": 0, "!</w>": 256, "in": 512, "a</w>": 320, "photo</w>": 1125, "cat</w>": 2368, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: tokens[token] for token in known} == known
    first, second = (Tokenizer.from_directory(folders[name]) for name in ("clip", "clip2"))
    assert first.encode(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert second.encode(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert second.encode(["hi!"])[0, :4].tolist() == [49406, 1883, 0, 49407]  # its padding token inside a text, as in transformers


def test_truncation_names_the_words_that_were_cut(folders):
    tokenizer = Tokenizer.from_directory(folders["clip"])
    assert tokenizer.truncated("") == tokenizer.truncated("cat " * 75) == ""
    assert tokenizer.truncated("cat " * 75 + "and a naïve 👍 dog") == "and a naïve 👍 dog"
    assert tokenizer.truncated("cat " * 74 + "supercalifragilistic dog") == "supercalifragilistic dog"  # cut inside a word
    assert len(tokenizer.encode_unbounded("cat " * 2000)) == 2000
    row = tokenizer.encode(["cat " * 2000])[0]
    assert row[0] == 49406 and row[76] == 49407 and set(row[1:76].tolist()) == {2368}


def test_reserved_words_in_a_prompt_do_not_end_it(folders):
    tokenizer = Tokenizer.from_directory(folders["clip"])
    with pytest.warns(TokenizerWarning, match="endoftext"):
        ids = tokenizer.encode_unbounded("a cat<|endoftext|> and a dog")
    assert not {49406, 49407} & set(ids)
    with pytest.warns(TokenizerWarning, match="startoftext"):
        row = tokenizer.encode(["<|startoftext|> a cat"])[0].tolist()
    assert row.count(49406) == 1


def test_invalid_unicode_is_refused(folders):
    with pytest.raises(TokenizerError, match="position 2"):
        Tokenizer.from_directory(folders["clip"]).encode(["a \udc80"])


def _copy(source: Path, target: Path, **changes: str | None) -> Path:
    for file in source.iterdir():
        text = changes.get(file.stem, file.read_text(encoding="utf-8"))
        if text is not None:
            (target / file.name).write_text(text, encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": None}, "vocab.json is missing"),
        ({"merges": None}, "merges.txt is missing"),
        ({"tokenizer_config": None}, "tokenizer_config.json is missing"),
        ({"vocab": "{"}, "vocab.json is not valid JSON"),
        ({"vocab": "[]"}, "expected a JSON object"),
        ({"vocab": '{"a": 0}'}, "bos_token .* is not in the vocabulary"),
        ({"merges": "#version: 0.2\na b c\n"}, "a merge has two parts, not 3"),
        ({"merges": "#version: 0.2\nz z\n"}, "gives a token that the vocabulary does not have"),
        ({"special_tokens_map": "{}", "tokenizer_config": "{}"}, "names the bos_token"),
    ],
)
def test_unfit_folders_are_named(tmp_path, changes, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(_copy(GOLDEN / "dev" / "base" / "tokenizer", tmp_path, **changes))


def test_added_tokens_are_refused(tmp_path):
    folder = _copy(GOLDEN / "dev" / "base" / "tokenizer", tmp_path)
    (folder / "added_tokens.json").write_text('{"<me>": 49408}')
    with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
        Tokenizer.from_directory(folder)


def test_other_published_forms(folders, tmp_path):
    """Special tokens as objects, and the single tokenizer.json that transformers 5 writes."""
    wrapped = {role: {"content": "<|endoftext|>", "lstrip": False} for role in ("eos_token", "unk_token")}
    wrapped |= {"bos_token": {"content": "<|startoftext|>"}, "pad_token": "!"}
    single = tmp_path / "single"
    single.mkdir()
    merges = [f"{left} {right}" for left, right in default_merges()]
    model = {"type": "BPE", "vocab": vocabulary(default_merges()), "merges": merges}
    (single / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    (single / "tokenizer_config.json").write_text(json.dumps(wrapped), encoding="utf-8")
    tokenizer, plain = Tokenizer.from_directory(single), Tokenizer.from_directory(folders["clip2"])
    np.testing.assert_array_equal(tokenizer.encode(["an (important) word!"]), plain.encode(["an (important) word!"]))


def test_torch_and_tensorflow_stay_out():
    code = (
        "import sys; from instantid_jax.text import Tokenizer; "
        f"t = Tokenizer.from_directory({str(GOLDEN / 'dev' / 'base' / 'tokenizer')!r}); t.encode(['the photo']); t.truncated('x'); "
        "sys.exit(', '.join({'torch', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=GOLDEN.parent.parent, check=False)
    assert done.returncode == 0, done.stderr
