"""The command line: what it prints, what it refuses, and that a failure leaves nothing behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert_weights.__main__ import main


def test_import_reports_every_network(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--controlnet", str(golden_snapshot / "controlnet_2"), "--out", str(tmp_path / "w")]) == 0
    out = capsys.readouterr().out
    assert "controlnet      242   1,085,968  float32  4.3  242 of 242 used" in out
    assert "written to" in out


def test_inspect_verify_and_diff(converted: Path, converted_controlnet: Path, golden_snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(converted)]) == 0
    out = capsys.readouterr().out
    assert "adapter/down_blocks/1/attentions/0/transformer_blocks/0/attn2/to_k_ip/kernel" in out
    assert "1094  88,126,347" in out
    assert main(["inspect", str(golden_snapshot / "instantid/ip-adapter.bin")]) == 0
    assert "75 tensors, 79,576,560 values, 318.3 MB" in capsys.readouterr().out
    assert main(["verify", str(converted)]) == 0
    assert "1094 tensors and 16 files are what manifest.json says" in capsys.readouterr().out
    assert main(["diff", str(converted_controlnet), str(converted_controlnet)]) == 0
    assert "242 tensors compared, all equal" in capsys.readouterr().out
    assert main(["diff", str(converted), str(golden_snapshot / "instantid/ip-adapter.bin")]) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_diff_of_files_says_what_and_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32), "c": np.ones(2, np.float32), "n": np.full(2, np.nan, np.float32)}
    two = {"a": np.array([0, 0.5, -2], np.float32), "b": np.ones(2, np.float16), "d": np.ones(2, np.float32), "n": np.zeros(2, np.float32)}
    save_file(one, tmp_path / "1.safetensors")
    save_file(two, tmp_path / "2.safetensors")
    assert main(["diff", str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "a: max abs difference 2\n" in out
    assert "b: type float32 and float16\n" in out
    assert "n: max abs difference nan\n" in out
    assert f"only in {tmp_path / '1.safetensors'}: c\n" in out
    assert f"only in {tmp_path / '2.safetensors'}: d\n" in out
    assert "3 tensors compared, 5 differences" in out


@pytest.mark.parametrize("victim", ["controlnet/state/conv_in/bias/c/0", "published/config.json", "manifest.json", "config.json"])
def test_verify_finds_one_changed_bit(victim: str, converted_controlnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(converted_controlnet, tmp_path / "w")
    path = tmp_path / "w" / victim
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("convert_weights: ") and error.count("\n") == 1
    assert "damaged" in error or "not what the manifest says" in error


def test_verify_finds_swapped_tensors(converted_controlnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(converted_controlnet, tmp_path / "w")
    state = tmp_path / "w/controlnet/state/down_blocks/0/resnets"
    a, b = state / "0/norm1/bias/c/0", state / "1/norm1/bias/c/0"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert main(["verify", str(tmp_path / "w")]) == 1
    assert "is not what the manifest says" in capsys.readouterr().err


def test_a_damaged_folder_is_not_exported(converted_controlnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(converted_controlnet, tmp_path / "w")
    (tmp_path / "w/controlnet/state/conv_in/bias/c/0").unlink()
    assert main(["export", "--weights", str(tmp_path / "w"), "--out", str(tmp_path / "out")]) == 1
    assert "conv_in/bias holds 0 of 128 bytes; convert or copy the weights again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w"
    command = ["import", "--controlnet", str(golden_snapshot / "controlnet_2"), "--out", str(out)]
    assert main(command) == 0
    (out / "config.json").write_text("changed")
    assert main(command) == 1
    assert "exists and is not empty; choose another --out, or give --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["verify", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]


def test_what_others_wrote_is_never_overwritten(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    command = ["import", "--controlnet", str(golden_snapshot / "controlnet_2"), "--out", str(out), "--overwrite"]
    assert main(command) == 1
    assert "was not written by this program; choose another --out" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert main(command) == 0
    (out / "mine.txt").write_text("precious")
    assert main(command) == 1
    assert "also holds 'mine.txt', which this program did not write" in capsys.readouterr().err
    assert main([*command[:-2], str(out / "mine.txt")]) == 1
    assert "mine.txt is a file; name a folder" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]


@pytest.mark.parametrize(("place", "how"), [("", "is"), ("..", "contains"), ("sub", "lies inside"), ("../link", "is")])
def test_a_source_is_never_overwritten(place: str, how: str, golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "all" / "source"
    shutil.copytree(golden_snapshot / "controlnet_2", source)
    (tmp_path / "all" / "link").symlink_to(source)
    files = sorted(p.name for p in source.iterdir())
    assert main(["import", "--controlnet", str(source), "--out", str(source / place), "--overwrite"]) == 1
    assert f" {how} {source}, which is read" in capsys.readouterr().err
    assert sorted(p.name for p in source.iterdir()) == files


def test_weights_are_never_overwritten_by_their_export(converted_controlnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "w", tmp_path / "out"
    shutil.copytree(converted_controlnet, weights)
    assert main(["export", "--weights", str(weights), "--out", str(weights), "--overwrite"]) == 1
    assert "which is read" in capsys.readouterr().err
    command = ["export", "--weights", str(weights), "--out", str(out)]
    assert main(command) == 0 and main(command) == 1 and main([*command, "--overwrite"]) == 0
    (out / "mine.txt").write_text("precious")
    assert main([*command, "--overwrite"]) == 1
    assert (out / "mine.txt").exists() and main(["verify", str(weights)]) == 0


@pytest.mark.parametrize(
    ("victim", "message"),
    [("tokenizer/vocab.json", "vocab.json is missing"), ("tokenizer_2/tokenizer_config.json", "tokenizer_config.json is missing")],
)
def test_incomplete_tokenizers_are_found_at_import(
    victim: str, message: str, golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(golden_snapshot / "base", base, copy_function=os.link)
    (base / victim).unlink()
    assert main(["import", "--base", str(base), "--instantid", str(golden_snapshot / "instantid"), "--out", str(tmp_path / "w")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_damaged_configuration_is_named(converted_controlnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(converted_controlnet, tmp_path / "w")
    (tmp_path / "w/config.json").write_text("{")
    assert main(["export", "--weights", str(tmp_path / "w"), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'w/config.json'} is damaged" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(golden_snapshot: Path) -> None:
    command = f"{sys.executable} -m convert_weights inspect {golden_snapshot / 'base/unet/diffusion_pytorch_model.safetensors'} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.startswith("tensor") and done.stderr == ""


def test_a_failed_import_leaves_nothing(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(golden_snapshot / "controlnet_2", source)
    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(source / name)
    tensors["mid_block.resnets.1.conv2.weight"][0, 0, 0, 0] = np.inf
    save_file(tensors, source / name)
    assert main(["import", "--controlnet", str(source), "--out", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert "mid_block.resnets.1.conv2.weight has NaN or infinity" in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["import", "--out", "x"], 2, "give --base and --instantid, or --controlnet alone"),
        (["import", "--base", "b", "--controlnet", "c", "--out", "x"], 2, "give either --controlnet, or --base and --instantid"),
        (["import", "--base", "absent", "--instantid", "absent", "--out", "x"], 1, "absent: there is no such file or folder"),
        (["import", "--controlnet", "absent", "--out", "x"], 1, "absent: there is no such file or folder"),
        (["export", "--weights", "absent", "--out", "x"], 1, "is not a folder of converted weights"),
        (["verify", "absent"], 1, "is not a folder of converted weights"),
        (["inspect", "absent"], 1, "absent: there is no such file or folder"),
        (["diff", "absent", "absent"], 1, "absent: there is no such file or folder"),
    ],
)
def test_errors_are_one_line(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_as_a_program_without_torch(golden_snapshot: Path) -> None:
    code = (
        "import sys\n"
        "from convert_weights.__main__ import main\n"
        f"code = main(['inspect', {str(golden_snapshot / 'instantid/ip-adapter.bin')!r}])\n"
        "sys.exit(code or ('torch' in sys.modules) * 3 or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [sys.executable, "-m", "convert_weights", "--help"], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("import", "export", "extract-lora", "inspect", "diff", "verify"))
