"""The compiler's account of a small program has not drifted from what docs/scale.json holds. Needs libtpu, no TPU."""

import importlib
import importlib.metadata
import json
from pathlib import Path

import jax
import pytest

from instantid_jax.parallel import aot

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs/scale.json").read_text(encoding="utf-8"))


def test_every_recorded_case_has_the_figures_that_are_promised() -> None:
    wanted = {"hbm_peak_bytes", "hbm_limit_bytes", "flops", "flops_minimum", "compile_seconds", "estimated_cycles", "collective_bytes"}
    assert RECORDED
    for name, result in RECORDED.items():
        assert wanted <= result.keys(), name
        assert result["fits"] == (result["hbm_peak_bytes"] <= result["hbm_limit_bytes"]) or not result["fits"], name


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
    assert main([*options, "--aot", "v9:1x1"]) == 1
    assert capsys.readouterr().err.startswith(f"{name}: 'v9:1x1' is no topology known here")
