"""Alternatives in prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instantid_jax.text import AlternativeError, expand, literal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, (weighted:1.2) [text]", ["plain, (weighted:1.2) [text]"]),
        ("{a|b} x", ["a x", "b x"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("{a|{b|c}d}", ["a", "bd", "cd"]),
        ("{long |}hair", ["long hair", "hair"]),
        ("{braces} and | bars } are text {", ["{braces} and | bars } are text {"]),
        ("{no bar {a|b}}", ["{no bar a}", "{no bar b}"]),
        (r"\{a|b\} \( {x\|y|z}", [r"{a|b} \( x|y", r"{a|b} \( z"]),
        ("__hair__ stays", ["__hair__ stays"]),
        ("", [""]),
    ],
)
def test_every_combination_in_order(text, expected):
    assert [found.text for found in expand(text)] == expected


def test_what_was_chosen():
    assert [found.chosen for found in expand("{a|{b|c}} {d|e}")] == [(x, y) for x in "abc" for y in "de"]


@given(st.text(alphabet="ab{}|\\_() ", max_size=30))
def test_a_literal_text_comes_back(text):
    assert [found.text for found in expand(literal(text))] == [text]


def test_wildcards_are_lines_of_files(tmp_path):
    (tmp_path / "hair.txt").write_text("# colours\nred\n\n{long|short} __tone__\n")
    (tmp_path / "tone.txt").write_text("black\ngray\n")
    found = expand("a __hair__ {x|y}", tmp_path)
    assert [one.text for one in found[::2]] == ["a red x", "a long black x", "a long gray x", "a short black x", "a short gray x"]
    assert found[3].chosen == ("long black", "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a|b", "that no '}' closes"),
        ("__har__", "har.txt: there is no such wildcard; did you mean 'hair'"),
        ("__self__", "has itself among its lines"),
        ("__empty__", "empty.txt: holds no lines"),
        ("{" * 20 + "a|b" + "}" * 20, "more than 16 braces"),
        ("{a|b}" * 13, "asks for 8192 prompts; at most 4096"),
    ],
)
def test_wrong_ones_get_one_sentence(text, message, tmp_path):
    (tmp_path / "hair.txt").write_text("red")
    (tmp_path / "self.txt").write_text("x\n__self__")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(AlternativeError, match=message.replace(".", r"\.")):
        expand(text, tmp_path)


def test_wildcards_stay_in_their_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "inside").mkdir()
    assert [found.text for found in expand("__../secret__ __/etc/hostname__", tmp_path / "inside")] == ["__../secret__ __/etc/hostname__"]
