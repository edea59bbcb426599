"""Which prompts the options ask for."""

import pytest

from instantid_jax.prompts import PromptFileError, prompts_of
from instantid_jax.sample_options import SampleOptions


def texts(**given):
    return [(asked.options.prompt, asked.options.negative_prompt) for asked in prompts_of(SampleOptions(**given).filled()).asked]


def test_combinations_and_styles_are_rows_and_columns():
    found = prompts_of(SampleOptions(prompt="a {red|blond} {big|small} person", style=("pixel art", "Photo"), seed=3).filled())
    assert found.columns == 2 and len(found.asked) == 8
    assert [found.asked[i].label for i in (0, 1, 7)] == ["Pixel art, red, big", "Photo, red, big", "Photo, blond, small"]
    assert found.asked[7].options.prompt == "photo of a blond small person" and found.asked[7].options.style == ("Photo",)
    assert {asked.options.seed for asked in found.asked} == {3}
    assert prompts_of(SampleOptions(prompt="{a|b} {c|d|e}")).columns == 3
    assert texts(prompt="x", negative_prompt="y", style=("Line art",))[0][1].endswith("oil, acrylic y")


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        '\ufeffprompt,negative_prompt,seed,style,ip_adapter_scale\n"a, {b|c}",,7,,0.3\n\n"d\ne",f,,Photo,"linear(1, 0)"\n', encoding="utf-8"
    )
    found = prompts_of(SampleOptions(prompt_file=path, seed=5, negative_prompt="n", style=("Pixel art",)).filled()).asked
    assert [(one.options.prompt, one.options.negative_prompt, one.options.seed, one.options.ip_adapter_scale) for one in found] == [
        ("pixel art of a, b", "n", 7, 0.3),
        ("pixel art of a, c", "n", 7, 0.3),
        ("photo of d\ne", "f", 5, "linear(1, 0)"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt\nx", "line 1: has an unknown column 'promt'; did you mean 'prompt'"),
        ("seed\n1", "line 1: has no column prompt"),
        ("prompt,prompt\nx,y", "line 1: has the column prompt twice"),
        ("", "line 1: has no column prompt"),
        ("prompt\n", "holds no prompts"),
        ("prompt,seed\nx,1\ny,two", "line 3, column seed: must be a whole number from 0 to 4294967295, not 'two'"),
        ('prompt,seed\n"x\ny",1\ny,-1', "line 4, column seed: must be a whole number"),
        ("prompt,guidance_scale\nx,nan", "line 2, column guidance_scale: must be a number from 0 to 100, not 'nan'"),
        ("prompt,guidance_scale\nx,9999", "line 2, column guidance_scale: must be a number from 0 to 100, not '9999'"),
        ("prompt,ip_adapter_scale\nx,linear(1 0)", "line 2, column ip_adapter_scale: 'linear(1 0)': ',' is needed (at '0', character 10)"),
        ("prompt,style\nx,Watercolour", "line 2, column style: there is no style 'Watercolour'; did you mean 'Watercolor'"),
        ("prompt,seed\n,1", "line 2, column prompt: must be a text, not ''"),
        ("prompt\nx, y", "line 2: has 2 cells for 1 columns; texts with commas go into quotes"),
        ('prompt\n"x', "line 2: cannot be read as CSV"),
        ("prompt\n{a|b", "line 2: '{a|b' has a '{' with alternatives"),
        ("prompt\n" + "x" * 200000, "line 2: cannot be read as CSV"),
    ],
)
def test_wrong_files_name_line_and_column(text, message, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(PromptFileError) as caught:
        prompts_of(SampleOptions(prompt_file=path).filled())
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_a_file_in_another_encoding_is_told(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes("prompt\nFrüh".encode("latin-1"))
    with pytest.raises(PromptFileError, match="is no UTF-8 text"):
        prompts_of(SampleOptions(prompt_file=path).filled())
