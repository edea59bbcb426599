"""Flat and nested trees, patterns, and the stacking of equal layers."""

import numpy as np
import pytest

from instantid_jax.paths import (
    PathError,
    first_match,
    flatten,
    map_paths,
    partition,
    select,
    stack_layers,
    stacked_path,
    unflatten,
    unstack_layers,
)

TREE = {"a": {"b": {"kernel": 1, "bias": 2}, "c": 3}, "d": 4}
FLAT = {"a/b/kernel": 1, "a/b/bias": 2, "a/c": 3, "d": 4}


def test_flatten_and_unflatten_are_inverse() -> None:
    assert flatten(TREE) == FLAT
    assert list(flatten(TREE)) == list(FLAT)
    assert unflatten(FLAT) == TREE
    assert flatten(TREE, "unet")["unet/a/c"] == 3
    assert flatten({}) == {}


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 1, "a": 2}, {"a/b": 1, "a/b/c": 2}])
def test_a_path_cannot_be_leaf_and_branch(flat: dict[str, int]) -> None:
    with pytest.raises(PathError, match="both a leaf and a branch"):
        unflatten(flat)


def test_map_paths_sees_path_and_leaf() -> None:
    assert map_paths(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}, "c": 2}) == {"a": {"b": "a/b=1"}, "c": "c=2"}


def test_first_match_takes_the_first() -> None:
    rules = [("kernel$", "first"), ("^a/", "second"), (".", "last")]
    assert [first_match(rules, path) for path in ("a/kernel", "a/bias", "b/bias")] == ["first", "second", "last"]
    assert first_match([("kernel", 1)], "bias") is None


def test_select_and_partition() -> None:
    assert select(TREE, ["kernel$", "^d$"]) == {"a": {"b": {"kernel": 1}}, "d": 4}
    chosen, rest = partition(TREE, ["^a/b/"])
    assert (flatten(chosen), flatten(rest)) == ({"a/b/kernel": 1, "a/b/bias": 2}, {"a/c": 3, "d": 4})


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PathError, match=r"'kernal' matches none of 4 paths, of which the first is 'a/b/kernel'"):
        select(TREE, ["bias", "kernal"])
    with pytest.raises(PathError, match="none"):
        partition({}, ["x"])


def test_stacked_path() -> None:
    assert stacked_path("encoder/layers/11/mlp/fc1/kernel") == ("encoder/layers/mlp/fc1/kernel", 11)
    assert stacked_path("layers/0/attn/to_q/kernel") == ("layers/attn/to_q/kernel", 0)
    assert stacked_path("down_blocks/1/attentions/0/transformer_blocks/1/ff/net_2/bias") == (
        "down_blocks/1/attentions/0/transformer_blocks/ff/net_2/bias",
        1,
    )
    for path in ("down_blocks/1/resnets/0/conv1/kernel", "conv_in/bias", "my_layers/0/kernel"):
        assert stacked_path(path) == (path, None)


def test_stacking_and_unstacking_are_inverse() -> None:
    disk = {"conv_in/bias": np.arange(3)}
    # Twelve layers: text order ("10" before "2") must not be the order of the stack.
    disk |= {f"encoder/layers/{i}/fc/bias": np.full(2, i) for i in reversed(range(12))}
    memory = stack_layers(disk, np.stack)
    assert list(memory) == ["conv_in/bias", "encoder/layers/fc/bias"]
    assert np.array_equal(memory["encoder/layers/fc/bias"][:, 0], np.arange(12))
    again = unstack_layers(memory)
    assert again.keys() == disk.keys()
    assert all(np.array_equal(again[path], disk[path]) for path in disk)


def test_unstack_takes_a_function_for_rows() -> None:
    assert unstack_layers({"layers/bias": np.zeros((2, 5))}, lambda leaf, i: (i, leaf.shape[1:])) == {
        "layers/0/bias": (0, (5,)),
        "layers/1/bias": (1, (5,)),
    }


def test_a_missing_layer_is_named() -> None:
    with pytest.raises(PathError, match=r"'layers/fc/bias': layers \[1\] of 3 are missing"):
        stack_layers({"layers/0/fc/bias": 0, "layers/2/fc/bias": 0}, list)
