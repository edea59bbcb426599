"""The command line as a newcomer meets it."""

import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lora_files import lora_arrays
from PIL import Image
from safetensors.numpy import save_file

import sample
from instantid_jax import sampling
from instantid_jax.config import sdxl, tiny, to_json
from instantid_jax.defaults import PROMPTS, default_config, people
from instantid_jax.diffusion import PRESETS, SAMPLERS
from instantid_jax.face import Face, load_photo
from instantid_jax.output import read_settings
from instantid_jax.pipeline import PipelineOutput
from instantid_jax.sample_options import PresetName, SampleOptions, SamplerName, gathered

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, sample; status = sample.main(sys.argv[1:]); print('HEAVY', sorted({'torch', 'tensorflow'} & set(sys.modules))); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_run_without_weights_makes_pictures_twice_alike(tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = run("--out", str(tmp_path / name), "--steps", "2")
        assert done.returncode == 0, done.stderr
        assert "trained on rendered heads" in done.stderr and "convert_weights import" in done.stderr
        assert "compiled in" in done.stdout
        assert "HEAVY []" in done.stdout
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    drawn = [f"{person.name}_{i:02d}.png" for person in people() for i in range(len(PROMPTS))]
    assert names == sorted([*drawn, "sheet.png"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    settings = read_settings(tmp_path / "a" / drawn[1])
    found = [settings[name] for name in ("seed", "size", "model", "prompt", "face", "steps", "guidance_scale")]
    assert found == [1, "64x64", "the small model", list(PROMPTS.values())[1], people()[0].name, 2, 2.0]
    with Image.open(tmp_path / "a" / "sheet.png") as image:
        assert image.width > image.height > 600


def test_a_photo_and_a_prompt_with_the_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, pose = people()[0].photo, people()[1].photo
    words = "photo of a person with long black hair, smiling, red background"
    out = tmp_path / "out"
    arguments = ["--face", str(photo), "--pose", str(pose), "--prompt", words, "--num-images", "2", "--steps", "2", "--out", str(out)]
    assert sample.main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "sheet.png"]
    with Image.open(out / "000001.png") as image:
        assert image.size == (64, 64)
    capsys.readouterr()
    assert sample.main(["--prompt", words, "--num-images", "2", "--steps", "1", "--out", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").iterdir())) == 2 * len(people()) + 1


@pytest.mark.usefixtures("stub")
def test_each_photo_with_several_faces_has_an_index_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (load_photo(person.photo).resize((400, 400)) for person in people()[:2])
    two = Image.new("RGB", (1000, 500), "white")
    two.paste(one, (50, 50)), two.paste(other, (550, 50))
    two.save(tmp_path / "two.png")
    arguments = ["--face", str(people()[0].photo), "--pose", str(tmp_path / "two.png"), "--out", str(tmp_path / "out")]
    assert sample.main(arguments) == 1
    error = capsys.readouterr().err
    assert "two.png: 2 faces found" in error and "--pose-face-index" in error
    assert sample.main([*arguments, "--pose-face-index", "1"]) == 0


class Stub:
    """A pipeline that keeps what it is called with and makes gray pictures, or raises `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.loaded: dict[str, Any] = {}
        self.called: dict[str, Any] = {}

    def load(self, *directory: Path, **options: Any) -> "Stub":
        self.loaded = {"directory": directory} | options
        return self

    def __call__(self, **arguments: Any) -> PipelineOutput:
        self.called = arguments
        if self.error is not None:
            raise self.error
        return PipelineOutput([Image.new("RGB", (64, 64), "gray")] * arguments["num_images_per_prompt"])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In place of both ways to a pipeline."""
    stub = Stub()
    monkeypatch.setattr(sampling, "default_pipeline", stub.load)
    monkeypatch.setattr(sampling.InstantIDPipeline, "from_pretrained", stub.load)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return stub


@pytest.fixture
def no_analyzer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, root: Path | None) -> None:
        raise AssertionError("no face analyzer is needed")

    monkeypatch.setattr(sample, "load_analyzer", fail)


def face_file(path: Path, width: int, size: tuple[int, int] = (640, 640)) -> Path:
    kps = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]]) * size[0] / 64
    np.savez(path, embedding=np.arange(1, width + 1, dtype=np.float32), kps=kps, size=size)
    return path


def weights_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(to_json(sdxl()))
    return path


def test_the_size_of_the_output_does_not_reach_the_detector(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    class Noting:
        name, embedding_dim = "opencv", 128

        def analyze(self, image: np.ndarray, det_size: int = 640) -> list[Face]:
            asked.append((image.shape, det_size))
            kps = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]]) * image.shape[0] / 64
            return [Face(np.float32([10, 10, 60, 60]) * image.shape[0] / 64, kps, 0.9, np.arange(1, 129, dtype=np.float32))]

    monkeypatch.setattr(sample, "load_analyzer", lambda *_: Noting())
    for size in ("", "--height 64 --width 128", "--height 512 --width 512"):
        asked.clear()
        assert sample.main(["--face", str(people()[0].photo), "--out", str(tmp_path / "out"), *size.split()]) == 0
        assert asked == [((1280, 1280, 3), 640)]
        assert stub.called["image"][0].size == ({"": (64, 64)} | {"--height 64 --width 128": (128, 64), "--height 512 --width 512": (512, 512)})[size]


@pytest.mark.usefixtures("no_analyzer")
def test_a_precomputed_face_needs_no_analyzer(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, face = weights_folder(tmp_path / "w"), face_file(tmp_path / "me.npz", 512)
    assert sample.main(["--weights", str(weights), "--face", str(face), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    options = {"weights_dtype": None, "loras": [], "lora_scales": ()}
    assert stub.loaded == {"directory": (weights,), "dtype": "bfloat16", "controlnets": (), **options}
    np.testing.assert_array_equal(stub.called["image_embeds"], np.arange(1, 513, dtype=np.float32))
    assert stub.called["image"][0].size == (1280, 1280)
    narrow = face_file(tmp_path / "narrow.npz", 128)
    assert sample.main(["--weights", str(weights), "--face", str(narrow), "--out", str(tmp_path / "other")]) == 1
    assert "has 128 values where 512 are expected" in capsys.readouterr().err


@pytest.mark.usefixtures("no_analyzer")
def test_every_option_reaches_the_call(stub: Stub, tmp_path: Path) -> None:
    picture = tmp_path / "depth.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    weights, face, pose = weights_folder(tmp_path / "w"), face_file(tmp_path / "me.npz", 512), face_file(tmp_path / "pose.npz", 7, (640, 320))
    options = "--num-images 2 --seed 5 --steps 9 --sampler ddim --sampler-option eta=0.5 --guidance-scale 3 --guidance-rescale 0.2 --clip-skip 1"
    options += " --identitynet-scale 0.7 --ip-adapter-scale 0.6 --control-start 0.1 --control-end 0.9 --height 64 --width 128"
    options += f" --controlnet a b --control-image {picture} {picture} --control-scale 0.5 0.4 --control-mask {picture} --prompt-weighting"
    options += " --guidance-start 0.2 --guidance-end 0.8 --cache-interval 3 --cache-branch-id 1 --control-interval 2"
    options += " --vae-tiling even --vae-tile-size 512 --weights-dtype int8"
    named = f"--weights {weights} --face {face} --pose {pose} --out {tmp_path / 'out'}"
    assert sample.main([*named.split(), *options.split(), "--prompt", "x y", "--negative-prompt", "z"]) == 2  # clip skip and weighting
    options = options.replace(" --prompt-weighting", "")
    assert sample.main([*named.split(), *options.split(), "--prompt", "x y", "--negative-prompt", "z"]) == 0
    assert stub.loaded["controlnets"] == (Path("a"), Path("b")) and stub.loaded["weights_dtype"] == "int8"
    called = stub.called
    assert [image.size for image in called.pop("image")] == [(128, 64), (64, 64), (64, 64)]
    mask = called.pop("control_mask")
    assert mask.shape == (64, 128) and (mask == 255).all()
    called.pop("on_step"), called.pop("image_embeds")
    assert called == {
        "prompt": "x y", "negative_prompt": "z", "prompt_weighting": False, "seed": 5, "sampler": "ddim", "clip_skip": 1,
        "guidance_scale": 3.0, "guidance_rescale": 0.2, "ip_adapter_scale": 0.6, "height": 64, "width": 128, "num_images_per_prompt": 2,
        "num_inference_steps": 9, "sampler_options": {"eta": 0.5}, "control_guidance_start": 0.1, "control_guidance_end": 0.9,
        "controlnet_conditioning_scale": [0.7, 0.5, 0.4], "guidance_start": 0.2, "guidance_end": 0.8, "cache_interval": 3,
        "cache_branch_id": 1, "control_interval": 2, "vae_tiling": "even", "vae_tile_size": 512,
        "identity_guidance_scale": None, "negative_identity_noise": 0.0, "negative_identity_seed": 0, "strength": None,
    }  # fmt: skip
    stored = read_settings(tmp_path / "out" / "000006.png")
    assert stored["seed"] == 6 and stored["weights"] == "w" and stored["controlnet"] == ["a", "b"] and stored["control_scale"] == [0.5, 0.4]
    assert [len(stored[f"{kind}_sha256"]) for kind in ("face", "pose", "control", "mask")] == [1, 1, 2, 1]
    assert str(tmp_path) not in str(stored)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("--weights nowhere --face README.md", 1, "nowhere is not a folder of converted weights"),
        ("--weights nowhere", 2, "no --face given"),
        ("--weights {tmp} --face README.md", 1, "config.json is damaged"),
        ("--face nowhere.jpg", 1, "nowhere.jpg: there is no such file"),
        ("--pose nowhere.jpg", 1, "nowhere.jpg: there is no such file"),
        ("--control-mask nowhere.jpg", 1, "nowhere.jpg: there is no such file"),
        ("--steps 0", 2, "--steps must be between 1 and 1000, not 0"),
        ("--sampler lcm --steps 60", 2, "use fewer steps"),
        ("--height 100", 2, "--height must be a multiple of 8"),
        ("--seed -1", 2, "--seed must be between 0 and 4294967295, not -1"),
        ("--num-images 0", 2, "--num-images must be between 1 and 4096, not 0"),
        ("--control-start 1", 2, "--control-start 1 must be smaller than --control-end 1"),
        ("--sampler-option karras=3", 2, "'karras' of sampler 'euler' must be True or False"),
        ("--sampler-option karas=true", 2, "did you mean 'karras'"),
        ("--sampler-option karras", 2, "--sampler-option must be written as key=value"),
        ("--face README.md", 1, "README.md"),
        ("--analyzer antelopev2", 1, "--analyzer-root DIR"),
        ("--out README.md", 1, "--out README.md: it is a file; name a folder"),
        ("--controlnet x", 2, "one of each for every ControlNet"),
        ("--controlnet x --control-image instantid_jax/assets/astronaut.jpg", 2, "--controlnet needs --weights"),
        ("--cache-interval 0", 2, "--cache-interval must be between 1 and 1000, not 0"),
        ("--vae-tile-size 64", 2, "--vae-tile-size has no meaning without --vae-tiling"),
        ("--lora nowhere.safetensors", 1, "nowhere.safetensors: there is no such file"),
        ("--lora README.md", 1, "README.md: "),
        ("--lora a --lora b --lora-scale 1", 2, "--lora-scale has 1 strengths for 2 --lora files; give one for each, or none"),
        ("--preset hyper-8 --sampler-option timestep_spacing=x", 2, "'timestep_spacing' of sampler 'ddim' must be 'leading'"),
        ("--preset lcm --steps 60", 2, "use fewer steps"),
        ("--face a.jpg b.jpg --face-weight 1", 2, "--face-weight has 1 weights for 2 --face photos; give one for each, or none"),
        ("--face a.jpg --face-weight 0", 2, "--face-weight must be above 0"),
        ("--face a.npz --face-combine normalised", 2, "a stored face is one already"),
        ("--face README.md --view yaw=120", 2, "yaw of a view must be between -90 and 90, not 120"),
        ("--face README.md --view turned", 2, "a view is written as yaw=30,pitch=-10"),
        ("--view yaw=10", 2, "--view needs a person to draw"),
        ("--face README.md --view yaw=10 --pose README.md", 2, "leave out --pose"),
        ("--aot v5e:1x1 --seed 3", 2, "--seed takes no part in --aot, which plans with --aot-json, --weights, --dtype"),
        ("--aot v5e:1x1 --steps 0", 2, "--steps must be at least 1, not 0"),
        ("--aot v5e:1x1 --num-images 0", 2, "--num-images must be at least 1, not 0"),
        ("--aot v5e:1x1 --height 0", 2, "height and width must be multiples of 8, not 0 and 0"),
        ("--aot v5e:1x1 --jobs docs/jobs.jsonl", 2, "--jobs takes no part in --aot"),
        ("--face README.md --blend-steps 7", 2, "--blend-steps goes with --blend"),
        ("--face README.md --view yaw=10 yaw=10", 2, "--view yaw=10 is asked for twice"),
        ("--guidance-scale 1 --guidance-rescale 0.5", 2, "--guidance-rescale has no meaning without guidance, which --guidance-scale 1 switches off"),
        ("--face README.md --blend README.md --blend-steps 1", 2, "--blend-steps must be between 2 and 1000, not 1"),
        ("--face README.md --blend nowhere.jpg", 1, "nowhere.jpg: there is no such file"),
        ("--enhance-non-face-region", 2, "--enhance-non-face-region needs a face"),
        ("--face README.md --enhance-non-face-region --control-mask README.md", 2, "leave out --control-mask"),
        ("--control-mask README.md", 2, "--control-mask has no meaning for the people who come along"),
    ],
)
def test_bad_input_gets_one_sentence_before_weights_are_loaded(
    arguments: str, status: int, message: str, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text("{")
    assert sample.main(["--out", str(tmp_path / "out"), *arguments.format(tmp=tmp_path).split()]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sample.py: ") and message in lines[0]
    assert stub.loaded == {}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "make", [MemoryError, lambda: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")], ids=["host", "device"]
)
def test_too_little_memory_is_one_sentence(make: Callable[[], BaseException], stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub.error = make()
    face = face_file(tmp_path / "me.npz", 128)
    assert sample.main(["--face", str(face), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 1
    assert stub.loaded == {"directory": (), "dtype": "bfloat16", "weights_dtype": None, "loras": [], "lora_scales": ()}
    assert (
        "sample.py: out of memory; try smaller --height and --width, fewer --num-images, --dtype bfloat16, --weights-dtype int8, or --vae-tiling even"
        in capsys.readouterr().err
    )
    stub.error = jax.errors.JaxRuntimeError("INTERNAL: a defect")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        sample.main(["--face", str(face), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--preset lightning-4", ("euler", 4, 0.0, {"timestep_spacing": "trailing"})),
        ("--preset turbo --steps 3", ("euler_a", 3, 0.0, {"timestep_spacing": "trailing"})),
        ("--preset hyper-1 --sampler-option eta=0.5 --steps 4", ("tcd", 4, 0.0, {"eta": 0.5})),
        ("--preset lcm --guidance-scale 1.5", ("lcm", 4, 1.5, {})),
        ("--preset hyper-8 --sampler unipc", ("unipc", 8, 0.0, {})),
        ("--sampler-option timestep_spacing=trailing", ("euler", 20, 2.0, {"timestep_spacing": "trailing"})),
    ],
)
def test_presets_are_settings_that_can_be_changed(options: str, expected: tuple[Any, ...], stub: Stub, tmp_path: Path) -> None:
    face = face_file(tmp_path / "me.npz", 128)
    assert sample.main(["--face", str(face), "--out", str(tmp_path / "out"), *options.split()]) == 0
    assert tuple(stub.called[name] for name in ("sampler", "num_inference_steps", "guidance_scale", "sampler_options")) == expected


def test_options_of_several_values_can_be_given_again() -> None:
    given = "--seed 1 --lora a b --face x --lora=c --lora_scale 1 -2 --seed 3 --lora d --lora-scale=3 --face=y --no-prompt-weighting"
    expected = "--seed 1 --lora a b c d --face x y --lora_scale 1 -2 3 --seed 3 --no-prompt-weighting"
    assert gathered(given.split()) == expected.split()


def test_loras_reach_the_pipeline_and_the_settings(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    face, out = face_file(tmp_path / "me.npz", 128), tmp_path / "out"
    sites = {"unet": ("down_blocks/1/attentions/0/transformer_blocks/0/attn1/to_q/kernel",), "text_encoder": ("encoder/layers/0/mlp/fc1/kernel",)}
    arrays = lora_arrays(default_config(), "kohya", sites)
    save_file(arrays, tmp_path / "one.safetensors")
    save_file(arrays | {"odd": np.ones(1, np.float32)}, tmp_path / "two.safetensors")
    common = ["--face", str(face), "--out", str(out)]
    named = ["--lora", str(tmp_path / "one.safetensors"), "--lora", str(tmp_path / "two.safetensors"), "--lora-scale", "0.8", "-0.5"]
    assert sample.main([*common, *named]) == 1
    refused = capsys.readouterr().err
    assert "two.safetensors: names that are not understood (1): odd. Leave them out with --allow-unknown-lora-keys" in refused
    assert refused.count("\n") == 1 and stub.loaded == {}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert sample.main([*common, *named, "--allow-unknown-lora-keys"]) == 0
    assert "sample.py: two.safetensors: names that are not understood (1): odd; they are left out" in capsys.readouterr().err
    assert [lora.name for lora in stub.loaded["loras"]] == ["one.safetensors", "two.safetensors"] and stub.loaded["lora_scales"] == (0.8, -0.5)
    stored = read_settings(out / "000000.png")
    assert stored["lora"] == ["one.safetensors", "two.safetensors"] and stored["lora_scale"] == [0.8, -0.5]
    assert stored["lora_sha256"] == [lora.digest for lora in stub.loaded["loras"]]


def test_names_that_are_chosen_from() -> None:
    assert typing.get_args(SamplerName) == tuple(SAMPLERS)
    assert typing.get_args(PresetName) == tuple(PRESETS)
    assert tiny().face_analyzer in typing.get_args(typing.get_args(typing.get_type_hints(SampleOptions)["analyzer"])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompts", "x"], "--prompt"), (["--sampler", "eular"], "euler"), (["--dtype", "float23"], "float32"), (["--analyzer", "x"], "opencv")],
)
def test_a_typo_gets_the_known_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sample.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("picture i has seed + i", "key=value", "other ControlNets", "white where IdentityNet", "python sample.py --weights DIR"):
        assert words in text
