"""Prompt weighting against what InstantID's official long-prompt code gave (tests/golden/prompt_weighting.json)."""

import json
from pathlib import Path

import numpy as np
import pytest

from instantid_jax.text import PromptError, Tokenizer, apply_weights, encode_weighted, flatten_groups, parse, write_default_tokenizers

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDED = json.loads((GOLDEN / "prompt_weighting.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    write_default_tokenizers(root)
    return {"dev": Tokenizer.from_directory(GOLDEN / "dev" / "base" / "tokenizer"), "clip": Tokenizer.from_directory(root / "tokenizer")}


@pytest.mark.parametrize(("prompt", "pieces"), RECORDED["parse"], ids=lambda value: repr(value)[:40])
def test_parse(prompt, pieces):
    assert [list(piece) for piece in parse(prompt)] == pieces


@pytest.mark.parametrize("name", ["dev", "clip"])
def test_groups_and_weights(tokenizers, name):
    rows = RECORDED["tokens"][name]
    assert len(rows) >= 90
    for row in rows:
        both = encode_weighted(tokenizers[name], row["prompt"], row["negative"])
        for tokens, ids, weights in zip(both, row["ids"], row["weights"], strict=True):
            assert tokens.ids.dtype == tokens.lengths.dtype == np.int32 and tokens.weights.dtype == np.float32
            assert tokens.ids.shape == tokens.weights.shape == (len(ids), 77)
            for g, length in enumerate(tokens.lengths):
                assert tokens.ids[g, :length].tolist() == _expand(ids[g]), row["prompt"]
                assert tokens.weights[g, :length].tolist() == _expand(weights[g]), row["prompt"]
                assert set(tokens.ids[g, length:].tolist()) <= {49407} and set(tokens.weights[g, length:].tolist()) <= {1.0}


def _expand(runs):
    return [value for value, count in runs for _ in range(count)]


@pytest.mark.parametrize(("words", "lengths"), [(0, [2]), (1, [3]), (74, [76]), (75, [77, 2]), (76, [77, 3]), (150, [77, 77, 2])])
def test_group_lengths(tokenizers, words, lengths):
    positive, negative = encode_weighted(tokenizers["clip"], "cat " * words, None)
    assert positive.lengths.tolist() == negative.lengths.tolist() == lengths
    assert (negative.ids[:, 1:] == 49407).all()
    longer, shorter = encode_weighted(tokenizers["clip"], "", "cat " * words)[::-1]
    np.testing.assert_array_equal(longer.ids, positive.ids)
    np.testing.assert_array_equal(shorter.ids, negative.ids)


@pytest.mark.parametrize("case", RECORDED["embeds"], ids=lambda case: case["prompt"])
def test_weighted_states(tokenizers, case):
    for tokens, want in zip(encode_weighted(tokenizers["clip"], case["prompt"], case["negative"]), case["states"], strict=True):
        p, c = np.arange(77)[None, :, None], np.arange(4)[None, None]
        states = np.sin(0.37 * tokens.ids[..., None] + 1.3 * p + 0.7 * c).astype(np.float32)
        flat, mask = flatten_groups(apply_weights(states, tokens.weights, tokens.lengths), tokens.lengths)
        assert flat.shape == (len(states) * 77, 4) and mask.shape == (len(states) * 77,)
        np.testing.assert_allclose(np.asarray(flat)[np.asarray(mask)], want, rtol=0, atol=2e-6)


def test_apply_weights_by_its_definition():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 5, 3)).astype(np.float32)
    weights = np.array([[1, 1.5, 0, 1, 1], [1, -1, 1, 1, 1]], np.float32)
    lengths = np.array([5, 3], np.int32)
    got = np.asarray(apply_weights(states, weights, lengths))
    np.testing.assert_allclose(got[0, 1], states[0, 4] + 1.5 * (states[0, 1] - states[0, 4]), rtol=1e-6)
    np.testing.assert_array_equal(got[0, 2], states[0, 4])
    np.testing.assert_allclose(got[1, 1], 2 * states[1, 2] - states[1, 1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[weights == 1], states[weights == 1])
    flat, mask = flatten_groups(got, lengths)
    assert np.asarray(mask).tolist() == [True] * 5 + [True] * 3 + [False] * 2
    np.testing.assert_array_equal(flat, got.reshape(10, 3))


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:.)", "b (a:+..)"])
def test_a_weight_that_is_no_number_is_refused(prompt):
    with pytest.raises(PromptError, match="is not a number"):
        parse(prompt)


def test_a_weight_beyond_float16_is_refused(tokenizers):
    with pytest.raises(PromptError, match="too large"):
        encode_weighted(tokenizers["dev"], "(a:70000)", "")
    assert encode_weighted(tokenizers["dev"], "(a:60000)", "")[0].weights.max() == 60000.0
