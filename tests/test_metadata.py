"""Settings of pictures, read as a stranger's text."""

import json
import zlib
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from instantid_jax.metadata import MAX_TEXT, MetadataError, read_recorded
from instantid_jax.output import run_settings, save_picture
from instantid_jax.replay import recorded_options
from instantid_jax.sample_options import SampleOptions
from instantid_jax.sampling import settings_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    photo = tmp_path_factory.mktemp("photo") / "me.png"
    Image.new("RGB", (8, 8)).save(photo)
    options = SampleOptions(face=(photo,), prompt="a {b|c}", negative_prompt="z", sampler_option=("eta=0.5",), view=("yaw=3",)).filled()
    return run_settings((64, 64), {"face": [photo]}, settings_of(options))


def png(path: Path, text: str, zipped: bool = False) -> Path:
    info = PngInfo()
    info.add_itxt("instantid_jax", text, zip=zipped)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_settings_come_back_as_options(suffix, settings, tmp_path):
    path = tmp_path / f"a{suffix}"
    save_picture(Image.new("RGB", (64, 64), "gray"), path, settings | {"watermark": False, "prompt": 'ü "quoted" \\ {x|y}'})
    found = read_recorded(path)
    assert found == json.loads(json.dumps(settings)) | {"watermark": False, "prompt": 'ü "quoted" \\ {x|y}'}
    options = recorded_options(found)
    assert options.prompt == 'ü "quoted" \\ \\{x\\|y\\}' and options.negative_prompt == "z" and options.watermark is False
    assert options.sampler_option == ("eta=0.5",) and options.view == ("yaw=3",) and options.steps == 20 and options.face == ()


def test_a_vector_is_kept_only_where_there_is_one(settings):
    asked = settings | {"keep_face_vector": True}
    assert not recorded_options(asked).keep_face_vector
    assert recorded_options(asked | {"face_vector": [1.0, 2.0]}).keep_face_vector


def test_other_programs_find_the_parameters(settings, tmp_path):
    save_picture(Image.new("RGB", (64, 64), "gray"), tmp_path / "a.jpg", settings)
    with Image.open(tmp_path / "a.jpg") as image:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be").startswith("a {b|c}\nNegative prompt: z\nSteps: 20, Sampler: euler")


def test_settings_too_long_for_a_jpeg_are_told(settings, tmp_path):
    with pytest.raises(ValueError, match="too long for this kind of file"):
        save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.jpg", settings | {"prompt": "x" * 30000})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "/etc/passwd"}, "weights must be a name without folders, not '/etc/passwd'"),
        ({"weights": ".."}, "weights must be a name without folders"),
        ({"lora": ["..\\x"]}, "lora must be a list, each a name without folders"),
        ({"controlnet": ["a", "b/c"]}, "controlnet must be a list, each a name"),
        ({"analyzer_root": "C:x"}, "analyzer_root must be a name without folders"),
        ({"face": "../person_1"}, "face must be a name without folders"),
        ({"out": "/tmp"}, "unknown key 'out'"),
        ({"control_mask": "mask.png"}, "unknown key 'control_mask'"),
        ({"init_image": "/etc/passwd"}, "unknown key 'init_image'"),
        ({"mask_image": "mask.png"}, "unknown key 'mask_image'"),
        ({"init_sha256": ["../x"]}, "init_sha256 must be a list, each a SHA-256"),
        ({"strength": "0.5"}, "strength must be a number"),
        ({"keep_unmasked": 1}, "keep_unmasked must be true or false"),
        ({"sample_mode": "best"}, "sample_mode must be one of sample, argmax"),
        ({"style_file": ["x"]}, "unknown key 'style_file'"),
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"steps": "20"}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**32}, "seed must be a whole number from 0"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
        ({"ip_adapter_scale": 10**400}, "ip_adapter_scale must be a strength: a number from -10 to 10, or a schedule"),
        ({"ip_adapter_scale": 11}, "ip_adapter_scale must be a strength"),
        ({"identitynet_scale": "linear(1, 0"}, "identitynet_scale must be a strength"),
        ({"identitynet_scale": "1, " * 20000}, "identitynet_scale must be a strength"),
        ({"control_scale": [1, "0 until 2 then 1"]}, "control_scale must be a list, each a strength"),
        ({"identity_guidance_scale": "2"}, "identity_guidance_scale must be a number"),
        ({"prompt": ["x"]}, "prompt must be a text"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": "x" * 40000}, "prompt must be a text of at most 32768 characters"),
        ({"sampler": "magic"}, "sampler must be one of euler"),
        ({"dtype": "float8"}, "dtype must be one of float32"),
        ({"watermark": 1}, "watermark must be true or false"),
        ({"face_sha256": ["xyz"]}, "face_sha256 must be a list, each a SHA-256"),
        ({"face_sha256": ["0" * 64] * 300}, "face_sha256 must be a list of at most 256"),
        ({"face_vector": [1.0] * 5000}, "face_vector must be a list of at most 4096"),
        ({"face_vector": [1.0], "face_keypoints": [[1, 2]] * 5}, "face_keypoints and face_size go together"),
        ({"face_keypoints": [[1, 2]] * 4}, "face_keypoints must be a list of 5"),
        ({"batch": {"count": 2}}, "batch must say which picture of how many"),
        ({"batch": {"count": 2, "index": 2}}, "batch must say which picture of how many"),
        ({"batch": {"count": 10**9, "index": 0}}, "count of batch must be a whole number from 1 to 4096"),
        ({"batch": {"count": 2, "index": 0, "x": 1}}, "unknown key 'x' in batch"),
        ({"batch": {"count": 2, "index": 0, "prompts": ["a"]}}, "prompts and negative_prompts of batch go together"),
        ({"size": "64x64x64"}, "size must be WIDTHxHEIGHT"),
        ({"made_with": "jax\nsample.py: all is well"}, "made_with must be a line of at most 1000 printable characters"),
        ({"version": "\x1b[31mred"}, "version must be a line of at most 1000 printable characters"),
        ({"prompt": {"a": {"b": {"c": {"d": 1}}}}}, "nested more than 4 deep"),
    ],
)
def test_hostile_settings_get_one_sentence(change, message, settings, tmp_path):
    path = png(tmp_path / "a.png", json.dumps({key: value for key, value in (settings | change).items()}))
    with pytest.raises(MetadataError) as caught:
        read_recorded(path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 50000, "nested more than 4 deep"),
        ('{"a":' * 20000, "nested more than 4 deep"),
        ('"\\"' * 40000, "no JSON"),
        ("{", "no JSON"),
        ("[1]", "must be one JSON object"),
        ('{"seed": 1, "seed": 2}', "a key is there twice"),
        ('{"guidance_scale": NaN}', "NaN is no number"),
        ('{"guidance_scale": 1e999}', "guidance_scale must be a number"),
        ('{"seed": ' + "9" * 5000 + "}", "refused"),
        ("x" * (MAX_TEXT + 1), f"at most {MAX_TEXT} are read"),
        ("{}", "prompt is missing"),
    ],
)
def test_hostile_text_gets_one_sentence(text, message, tmp_path):
    with pytest.raises(MetadataError) as caught:
        read_recorded(png(tmp_path / "a.png", text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bombs_are_not_unpacked(tmp_path):
    with pytest.raises(MetadataError, match=r"cannot be read|holds no settings"):
        read_recorded(png(tmp_path / "a.png", "x" * (1 << 24), zipped=True))
    header = bytearray(png(tmp_path / "b.png", "{}").read_bytes())
    header[16:24] = (60000).to_bytes(4, "big") * 2  # 3.6 thousand million pixels, by the header
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (tmp_path / "b.png").write_bytes(header)
    with pytest.raises(MetadataError, match="DecompressionBombError"):
        read_recorded(tmp_path / "b.png")


def test_files_that_are_none_of_ours(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    with pytest.raises(MetadataError, match="holds no settings of"):
        read_recorded(tmp_path / "plain.jpg")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MetadataError, match="is no PNG, JPEG or WebP"):
        read_recorded(tmp_path / "text.png")
