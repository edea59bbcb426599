"""sample.py with preprocessors of control pictures, on a pipeline that only notes what it is called with; and the documented command."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from instantid_jax import jobs, sampling
from instantid_jax.control_maps import canny, fitted, main
from instantid_jax.face import load_photo
from instantid_jax.onnx_map import OnnxMap
from instantid_jax.onnx_pose import OnnxPose
from instantid_jax.output import file_digest, read_settings
from tests.cli.test_sample import Stub, face_file, weights_folder
from tests.fake_maps import peaks, write_depth, write_simcc

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "instantid_jax/assets/astronaut.jpg"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(sampling.InstantIDPipeline, "from_pretrained", stub.load)
    return stub


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    """A command with two ControlNets, without its preprocessors."""
    face = face_file(tmp_path / "me.npz", 512)
    command = f"--weights {weights_folder(tmp_path / 'w')} --face {face} --width 128 --height 64 --controlnet a b --control-image {PHOTO} {PHOTO}"
    return [*command.split(), "--prompt", "x"]


def test_maps_reach_the_call_the_sheet_and_the_settings(stub: Stub, named: list[str], tmp_path: Path) -> None:
    model, out = write_depth(tmp_path / "depth.onnx"), tmp_path / "out"
    chosen = ["--control-preprocess", "canny:50,100", "depth:invert", "--control-model", str(model)]
    assert sample.main([*named, *chosen, "--no-watermark", "--out", str(out)]) == 0  # the mark changes the sheet's pixels
    _, edges, depth = stub.called["image"]
    photo = fitted(load_photo(PHOTO), (128, 64))
    assert (np.asarray(edges) == np.asarray(canny(photo, 50, 100))).all()
    assert (np.asarray(depth) == np.asarray(OnnxMap(model, invert=True)(photo))).all()
    settings = read_settings(out / "000000.png")
    assert settings["control_preprocess"] == ["canny:50,100", "depth:invert"] and settings["preprocessor_sha256"] == [file_digest(model)]
    assert "control_model" not in settings and str(tmp_path) not in str(settings) and len(settings["control_sha256"]) == 2
    with Image.open(out / "000000.png") as image:
        assert 'Control preprocessors: ["canny:50,100", "depth:invert"]' in image.info["parameters"].replace("'", '"')
    with Image.open(out / "sheet.png") as with_maps:
        sheet = np.asarray(with_maps)
    columns = [sheet[12:396, 12 + i * 396 : 396 + i * 396] for i in range(3)]  # photo, photo, edges
    assert (columns[0] == columns[1]).all()
    middle = columns[2][96:288]  # 128 x 64 pixels, three times as large
    assert (middle[1::3, 1::3] == np.asarray(edges)).all()
    assert (sheet[12 + 418 + 96 : 12 + 418 + 288, 12:396][1::3, 1::3] == np.asarray(depth)).all()


def test_a_picture_is_made_again_with_the_same_model_alone(
    stub: Stub, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = write_depth(tmp_path / "depth.onnx"), tmp_path / "out" / "000000.png"
    chosen = ["--control-preprocess", "canny", "depth", "--control-model", str(model)]
    assert sample.main([*named, *chosen, "--out", str(tmp_path / "out")]) == 0
    maps = [np.asarray(image) for image in stub.called["image"]]
    again = ["--replay", str(first), *named, "--out", str(tmp_path / "again")]
    capsys.readouterr()
    assert sample.main(again) == 1
    digest = file_digest(model)[:12]
    assert f"was made with 1 file(s) of --control-model; name them (SHA-256 {digest}...)" in capsys.readouterr().err
    other = write_depth(tmp_path / "other.onnx", squeezed=True)
    assert sample.main([*again, "--control-model", str(other)]) == 1
    assert f"other.onnx is not the --control-model of 000000.png: SHA-256 {file_digest(other)[:12]}..., recorded {digest}" in capsys.readouterr().err
    assert sample.main([*again, "--control-model", str(model)]) == 0
    assert "in place of" not in capsys.readouterr().out
    assert all((np.asarray(image) == old).all() for image, old in zip(stub.called["image"], maps, strict=True))
    assert (tmp_path / "again" / "000000.png").read_bytes() == first.read_bytes()
    assert sample.main([*again, "--control-preprocess", "canny", "none", "--out", str(tmp_path / "none")]) == 0
    assert "--control-preprocess canny none in place of canny depth" in capsys.readouterr().out
    settings = read_settings(tmp_path / "none" / "000000.png")
    assert settings["control_preprocess"] == ["canny", "none"] and "preprocessor_sha256" not in settings


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--control-preprocess canny", 2, "--control-preprocess has 1 values for 2 --controlnet"),
        (
            "--control-preprocess canny dept",
            2,
            "--control-preprocess: there is no preprocessor 'dept'; known: none, canny, depth, image, pose; did you mean",
        ),
        ("--control-preprocess canny depth", 2, "--control-model has 0 files, --control-preprocess asks for 1"),
        ("--control-model README.md", 2, "--control-model has 1 files, --control-preprocess asks for 0"),
        ("--control-preprocess canny depth --control-model nowhere.onnx", 1, "nowhere.onnx: there is no such file"),
        ("--control-preprocess canny depth --control-model README.md", 1, "README.md: cannot be loaded as an ONNX model"),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_loaded(
    options: str, status: int, message: str, stub: Stub, named: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert sample.main([*named, *options.split(), "--out", str(tmp_path / "out")]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and stub.loaded == {}


def test_jobs_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[Image.Image]] = []

    class Noting:
        width = 1

        def prepare(self, request: object, image: list[Image.Image], *_: object) -> dict[str, int]:
            seen.append(image)
            return {}

        def kind(self, *_: object) -> str:
            return "all"

        def draw(self, request: object, calls: list[object]) -> np.ndarray:
            return np.zeros((1, 1, 64, 128, 3), np.float32)

    noting = Noting()
    monkeypatch.setattr(jobs, "open_pipeline", lambda given, loras: noting)
    monkeypatch.setattr(jobs, "Spread", type("Spread", (), {"__new__": lambda cls, pipe: noting, "kind": noting.kind}))
    face_file(tmp_path / "me.npz", 512)
    model = write_depth(tmp_path / "depth.onnx")
    (tmp_path / "broken.onnx").write_text("no model")
    job = {"face": "me.npz", "prompt": "x", "width": 128, "height": 64, "control_image": str(PHOTO), "control_preprocess": "depth"}
    lines = [job | {"control_model": name} for name in ("depth.onnx", "broken.onnx", "gone.onnx")]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--weights", str(weights_folder(tmp_path / "w")), "--controlnet", "a", "--jobs", str(tmp_path / "jobs.jsonl")]
    assert sample.main([*arguments, "--out", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert "line 2, me, seed 0: " in told and "broken.onnx: cannot be loaded" in told and "gone.onnx: there is no such file" in told
    ((_, depth),) = seen
    assert (np.asarray(depth) == np.asarray(OnnxMap(model)(fitted(load_photo(PHOTO), (128, 64))))).all()
    (path,) = (tmp_path / "out" / "me").iterdir()
    assert read_settings(path)["preprocessor_sha256"] == [file_digest(model)]
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job))
    assert sample.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "line 1: control_model has 0 files, control_preprocess asks for 1" in capsys.readouterr().err


def documented(start: str) -> list[str]:
    """The page's lines in bash that begin so."""
    text = (ROOT / "docs/composing.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.startswith(start)]


def test_the_documented_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = documented("python -m instantid_jax.control_maps canny ")
    assert main([*shlex.split(command)[3:], "--out", str(tmp_path / "map.png")]) == 0
    with Image.open(tmp_path / "map.png") as made, Image.open("docs/images/edges.png") as shown:
        assert (np.asarray(made) == np.asarray(shown)).all()


def test_the_documented_pose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = documented("python -m instantid_jax.control_maps pose ")
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(PHOTO.read_bytes())
    places, sides = np.array([np.arange(133) * 4 + 5, np.arange(133) * 5 + 40]), (576, 768)
    write_simcc(Path("dw-ll_ucoco_384.onnx"), *(peaks(one, bins, np.full(133, 0.9)) for one, bins in zip(places, sides, strict=True)), (288, 384))
    assert main(shlex.split(command)[3:]) == 0
    with Image.open("pose.png") as made:
        assert (np.asarray(made) == np.asarray(OnnxPose("dw-ll_ucoco_384.onnx")(load_photo(PHOTO)))).all() and made.size == (512, 512)


def test_the_documented_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/composing.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "draw_pose" in block]
    exec(code, {})
    with Image.open("pose.png") as made, Image.open(ROOT / "docs/images/pose.png") as shown:
        assert (np.asarray(made) == np.asarray(shown)).all()


def test_a_pose_reaches_the_call_and_the_settings(stub: Stub, named: list[str], tmp_path: Path) -> None:
    model, out = tmp_path / "pose.onnx", tmp_path / "out"
    write_simcc(model, *(peaks(np.arange(17) * 4 + 200, bins, np.full(17, 0.9)) for bins in (576, 768)), (288, 384))
    chosen = ["--control-preprocess", "none", "pose:body,0.25,0,0.75,1", "--control-model", str(model)]
    assert sample.main([*named, *chosen, "--out", str(out)]) == 0
    pose = np.asarray(stub.called["image"][2])
    assert (pose == np.asarray(OnnxPose(model, box=(0.25, 0, 0.75, 1))(fitted(load_photo(PHOTO), (128, 64))))).all() and pose.any()
    settings = read_settings(out / "000000.png")
    assert settings["control_preprocess"] == ["none", "pose:body,0.25,0,0.75,1"] and settings["preprocessor_sha256"] == [file_digest(model)]
