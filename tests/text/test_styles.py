"""Style templates."""

import hashlib
import json
from dataclasses import asdict

import pytest

from instantid_jax.text import Style, StyleError, find_style, packaged_styles, read_styles


def test_the_nine_of_the_published_demo_are_there_to_the_letter():
    told = json.dumps([asdict(style) for style in packaged_styles()[:9]], sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest() == "dcb0f7f434d3262ec2e4bbec657c3feaedde43828b358b23680b77feb9478e6b"
    names = ["(No style)", "Watercolor", "Film Noir", "Neon", "Jungle", "Mars", "Vibrant Color", "Snow", "Line art"]
    assert [style.name for style in packaged_styles()[:9]] == names


def test_as_the_demo_applies_them():
    style = Style("x", "a {prompt}, {prompt} b", "bad")
    assert style.apply("cat", "dog") == ("a cat, cat b", "bad dog")
    assert style.apply("cat") == ("a cat, cat b", "bad") and Style("x").apply("cat") == ("cat", None) and Style("x").apply("cat", "") == ("cat", "")


def test_files_as_fooocus_has_them(tmp_path):
    path = tmp_path / "styles.json"
    path.write_text(json.dumps([{"name": "sai-3d-model", "prompt": "3d {prompt}"}, {"name": "Fooocus Negative", "negative_prompt": "bad"}]))
    first, second = read_styles(path)
    assert first.apply("x") == ("3d x", None) and second.apply("x") == ("x", "bad")
    assert find_style("SAI 3D Model", [first, second]) is first
    with pytest.raises(StyleError, match=r"no style 'sai 2d model'; did you mean 'sai-3d-model'"):
        find_style("sai 2d model", [first, second])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "must be a list of styles"),
        ('["x"]', "entry 1 must be an object"),
        ('[{"name": "a", "promt": "x"}]', "entry 1 has an unknown field 'promt'; did you mean 'prompt'"),
        ('[{"name": "a"}, {"name": "b", "prompt": 3}]', "entry 2: prompt must be a text, not 3"),
        ('[{"prompt": "{prompt}"}]', "entry 1 has no name"),
        ('[{"name": "a", "prompt": "x"}]', r"entry 1 \(a\): prompt must hold {prompt}"),
        ("[" * 100000, "cannot be read as JSON"),
    ],
)
def test_wrong_files_get_one_sentence(text, message, tmp_path):
    path = tmp_path / "styles.json"
    path.write_text(text)
    with pytest.raises(StyleError, match=f"styles.json: {message}"):
        read_styles(path)
