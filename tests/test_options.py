"""Wrong options: what is said of them, and the exit status."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from instantid_jax.options import OptionError, Range, check_command, check_folder, check_options, status_of, wrong_options

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "says"),
    [
        (Range(1), 1, 0, "must be at least 1, got 0"),
        (Range(0, 1), 1, 1.5, "must be between 0 and 1, got 1.5"),
        (Range(0, 1, below=True), 0, 1, "must be at least 0 and below 1, got 1"),
        (Range(0, above=True, below=True), 1e-9, 0, "must be above 0 and finite, got 0"),
        (Range(0, above=True, below=True), 3, math.inf, "must be above 0 and finite, got inf"),
        (Range(0), math.inf, math.nan, "must be at least 0, got nan"),
        (Range(high=4), -5, 5, "must be at most 4, got 5"),
    ],
)
def test_a_range_and_what_is_said_outside_it(allowed, inside, outside, says):
    assert allowed.problem(inside) is None and allowed.problem(outside) == says
    with pytest.raises(OptionError, match=f"^--num-shards {says}$"):
        check_options(SimpleNamespace(num_shards=outside), {"num_shards": allowed})
    check_options(SimpleNamespace(num_shards=None), {"num_shards": allowed})


def test_wrong_options_have_status_two():
    with pytest.raises(OptionError, match=r"^mine$") as caught, wrong_options():
        raise ValueError("mine")
    assert status_of(caught.value) == 2 and status_of(ValueError("mine")) == 1
    with pytest.raises(OSError, match="other"), wrong_options():
        raise OSError("other")


def test_a_command_that_is_nearly_one(capsys):
    with pytest.raises(SystemExit) as stop:
        check_command("prepare", ["manifets", "--out", "x"], ["folder", "manifest"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "prepare: there is no command 'manifets'; did you mean 'manifest'?\n"
    for fine in (["folder"], ["--help"], [], ["qqq"]):
        check_command("prepare", fine, ["folder", "manifest"])


def test_a_folder_that_cannot_be_is_refused_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file; name a folder"):
            check_folder(out)
    check_folder(tmp_path / "new" / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no folders from anybody")
def test_a_place_that_takes_no_folder_is_named():
    with pytest.raises(ValueError, match=r"^--out /proc/x: /proc cannot be written to \(.+\); name another folder$"):
        check_folder(Path("/proc/x"))


@pytest.mark.parametrize("module", ["sample", "instantid_jax.data.prepare", "convert_weights"])
def test_a_reader_that_stops_reading_is_no_error(module):
    """As `... --help | head -1`: no traceback, whoever it was."""
    command = f"{sys.executable} -m {module} --help | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "u" and done.stderr == ""
