"""The progress bar as a terminal sees it."""

import io

import pytest

from instantid_jax.progress import StepBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watch(file: io.StringIO, steps: int = 3) -> list[str]:
    """What was drawn, one entry a redraw."""
    with StepBar(steps, file) as bar:
        for index in range(steps):
            bar.on_step(index)
    return [line.strip() for line in file.getvalue().replace("\n", "\r").split("\r") if line.strip()]


def test_every_stage_is_named() -> None:
    lines = watch(Terminal())
    stages = list(dict.fromkeys(line.split(":")[0] for line in lines))
    assert stages == ["compiling", "denoising", "decoding", "done"]
    assert "0/3" in lines[0] and "3/3" in lines[-1]
    assert any("1/3" in line for line in lines) and any("2/3" in line for line in lines)


@pytest.mark.parametrize(("columns", "longest"), [("0", 80), ("40", 40), ("500", 100)])
def test_a_bar_fits_its_terminal(columns: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = watch(Terminal())
    assert all(len(line) <= longest for line in lines)
    assert any("step" in line for line in lines)


def test_a_file_gets_nothing() -> None:
    assert watch(io.StringIO()) == []
