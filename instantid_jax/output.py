"""Pictures on disk: files that carry their settings and an invisible mark, and contact sheets.

A PNG holds two text chunks: `parameters`, in the form that other tools for Stable Diffusion read, and `instantid_jax`,
the same settings and more as JSON. JPEG and WebP hold the same in EXIF: UserComment and ImageDescription. Of the files that went
in (photos, control pictures, weights) they hold names or hashes, no folders, and no face vector unless that was asked for; the
contact sheet shows the photos. Files appear whole or not at all, and equal settings give equal bytes. No picture is written over
one with other settings: its name gets a number.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import ExifTags, Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from instantid_jax.face import load_photo
from instantid_jax.watermark import mark_picture

__all__ = [
    "contact_sheet",
    "file_digest",
    "free_path",
    "made_with",
    "parameters_text",
    "place_in_batch",
    "read_settings",
    "run_settings",
    "save_contact_sheet",
    "save_picture",
    "save_run",
    "settings_text",
    "suffix_of",
    "weights_digest",
    "without_folders",
]

KEY = "instantid_jax"
READ = ("PNG", "JPEG", "WEBP")
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_MAX_EXIF = 65000  # a JPEG's segment holds less than 65536 bytes


def parameters_text(settings: Mapping[str, Any]) -> str:
    """Settings as prompt, negative prompt, and one line of ``Name: value`` pairs."""
    names = {
        "steps": "Steps",
        "sampler": "Sampler",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "size": "Size",
        "model": "Model",
        "identitynet_scale": "IdentityNet strength",
        "ip_adapter_scale": "Adapter strength",
        "guidance_rescale": "CFG rescale",
        "identity_guidance_scale": "Identity guidance",
        "negative_identity_noise": "Negative identity noise",
        "negative_identity_seed": "Negative identity seed",
        "clip_skip": "Clip skip",
        "prompt_weighting": "Prompt weighting",
        "sampler_option": "Sampler options",
        "control_start": "Control starts at",
        "control_end": "Control ends at",
        "preset": "Preset",
        "strength": "Denoising strength",
        "mask_blur": "Mask blur",
        "lora": "LoRAs",
        "lora_scale": "LoRA strengths",
        "controlnet": "ControlNets",
        "control_scale": "ControlNet strengths",
        "control_preprocess": "Control preprocessors",
        "version": "Version",
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    told = {title: settings[key] for key, title in names.items() if settings.get(key) not in (None, [], (), False)}
    lines.append(", ".join(f"{title}: {_quoted(value)}" for title, value in told.items()))
    return "\n".join(lines)


def _quoted(value: Any) -> Any:
    """A text with a comma or a colon in quotes, as other tools read it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and re.search("[,:]", value) else value


def save_picture(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG, JPEG or WebP, by the ending of `path`, with its settings inside, and with the mark where they say `watermark`.

    Written through a temporary file, so that a broken write leaves nothing behind. Raises ValueError for settings that a JPEG has no
    room for.
    """
    if settings.get("watermark"):
        image = mark_picture(image)
    text = json.dumps(settings, sort_keys=True, ensure_ascii=path.suffix != ".png")
    if path.suffix == ".png":
        info = PngInfo()
        info.add_itxt("parameters", parameters_text(settings))
        info.add_itxt(KEY, text)
        options: dict[str, Any] = {"format": "PNG", "pnginfo": info, "compress_level": 6}
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = text
        exif[ExifTags.Base.Software] = str(settings.get("version", KEY))
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + parameters_text(settings).encode("utf-16-be")
        data = exif.tobytes()
        if len(data) > _MAX_EXIF:
            raise ValueError(f"{path}: the settings are too long for this kind of file ({len(data)} bytes, at most {_MAX_EXIF}); use --format png")
        options = {"exif": data, "quality": 95} | ({"format": "JPEG", "subsampling": 0} if path.suffix == ".jpg" else {"format": "WEBP"})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        image.save(temporary, **options)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON settings of a whole picture that `save_picture` wrote. Raises ValueError where there are none.

    For files of one's own: `metadata.read_recorded` is for those of others.
    """
    with Image.open(path, formats=READ) as image:
        image.load()
        text = settings_text(image)
    if text is None:
        raise ValueError(f"{path} holds no instantid_jax settings")
    return json.loads(text)


def settings_text(image: Image.Image) -> str | None:
    """The JSON text that an opened picture holds, or None. Pixels are not decoded."""
    text = image.info.get(KEY) if image.format == "PNG" else image.getexif().get(ExifTags.Base.ImageDescription)
    return text if isinstance(text, str) and (image.format == "PNG" or text.startswith("{")) else None


def free_path(path: Path, settings: Mapping[str, Any]) -> Path:
    """`path`, or where it holds something else than a picture of these settings, the first of name-2, name-3 ... that does not."""
    wanted = json.loads(json.dumps(settings))
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not candidate.exists():
            return candidate
        try:
            if read_settings(candidate) == wanted:
                return candidate
        except (ValueError, OSError):
            continue  # somebody else's file
    raise AssertionError("unreachable")


def weights_digest(folder: Path) -> str:
    """Hash that tells weights apart: that of the manifest that `convert_weights` wrote, of a small model's one file, or else of all files.

    Files are read once, and again when their size or time of change is another.
    """
    named = next((folder / name for name in ("manifest.json", "weights.safetensors") if (folder / name).is_file()), None)
    files = [named] if named else sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return _digest_of(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@functools.lru_cache(maxsize=64)
def _digest_of(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    if len(files) == 1 and files[0][0].parent == folder:
        return file_digest(files[0][0])
    told = (f"{path.relative_to(folder)} {file_digest(path)}" for path, _, _ in files)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def save_run(
    out: Path,
    images: Sequence[Image.Image],
    keypoints: Image.Image,
    inputs: Mapping[str, Sequence[Path]],
    settings: Mapping[str, Any],
    maps: Sequence[tuple[str, Image.Image]] = (),
) -> list[Path]:
    """The pictures of one run and their contact sheet, each with all settings inside.

    `inputs` are the picture files that went in, by what they are ("face", "pose", "control"): their SHA-256 is stored as
    ``face_sha256`` and so on, and those that are pictures are shown on the sheet, by their file's name, beside `maps`, labelled
    pictures that were made of them. Of other paths in `settings` the last part is stored. Picture i is named by its own seed,
    ``settings["seed"] + i``. Returns the paths, the sheet last.
    """
    settings = run_settings(images[0].size, inputs, settings)
    each = [settings | place_in_batch(settings["seed"], i, len(images)) for i in range(len(images))]
    seeds = [own["seed"] for own in each]
    paths = [free_path(out / f"{own['seed']:06d}{suffix_of(own)}", own) for own in each]
    for path, image, own in zip(paths, images, each, strict=True):
        save_picture(image, path, own)
    no_pictures = (".npz", ".npy", ".toml", ".json")
    given = [(kind, path) for kind, files in inputs.items() for path in files if kind != "preprocessor" and path.suffix not in no_pictures]
    shown = [(f"{kind}: {path.name}", load_photo(path)) for kind, path in given]
    shown += [*maps, ("keypoints", keypoints), *((f"seed {seed}, {settings['model']}", image) for seed, image in zip(seeds, images, strict=True))]
    return [*paths, save_contact_sheet(out, contact_sheet(shown), settings)]


def save_contact_sheet(out: Path, sheet: Image.Image, settings: Mapping[str, Any]) -> Path:
    """Writes a contact sheet, always as PNG, and returns its path."""
    settings = {**settings, "sheet": True}
    path = free_path(out / "sheet.png", settings)
    save_picture(sheet, path, settings)
    return path


def place_in_batch(seed: int, index: int, count: int, **prompts: Any) -> dict[str, Any]:
    """Settings that tell picture `index` of `count` that are drawn at once, the first with `seed`: its own seed, and which one it is.

    A picture differs by rounding from one that is drawn alone, so making it again takes the whole batch. `prompts` are the
    batch's texts where they differ.
    """
    own = {"seed": (seed + index) % 2**32}  # they wrap as the pipeline's do
    return own if count == 1 and not prompts else own | {"batch": {"count": count, "index": index, **prompts}}


def suffix_of(settings: Mapping[str, Any]) -> str:
    """The ending of a picture's name, by its `format`."""
    return SUFFIXES[settings.get("format", "png")]


def run_settings(size: tuple[int, int], inputs: Mapping[str, Sequence[Path]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are stored: of paths the last part, the pictures' (width, height), hashes of the files that went in, what computed."""
    told = {k: without_folders(v) for k, v in settings.items()} | {"size": f"{size[0]}x{size[1]}", "made_with": made_with()}
    return told | {f"{kind}_sha256": [file_digest(path) for path in paths] for kind, paths in inputs.items() if paths}


def made_with() -> str:
    """What the bytes of a picture depend on beside its settings: JAX and the kind of device."""
    return f"jax {jax.__version__}, {jax.default_backend()}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def without_folders(value: Any) -> Any:
    """Paths by their last part, also inside tuples."""
    if isinstance(value, tuple | list):
        return [without_folders(v) for v in value]
    return value.resolve().name if isinstance(value, Path) else value


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]], *, columns: int | None = None, side: int = 384) -> Image.Image:
    """Labelled pictures in a grid: each fitted into a square of `side` pixels, its label, or what fits of it, below."""
    margin, label = 12, 22
    columns = columns or min(len(pictures), max(3, math.ceil(math.sqrt(len(pictures)))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (side + label + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, picture) in enumerate(pictures):
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        fitted = picture.convert("RGB").resize(size, Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)
        left, top = margin + (i % columns) * (side + margin), margin + (i // columns) * (side + label + margin)
        sheet.paste(fitted, (left + (side - fitted.width) // 2, top + (side - fitted.height) // 2))
        draw.text((left, top + side + 4), _cut(draw, text, side + margin // 2), fill="black", font_size=14)
    return sheet


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, or as much of its beginning as fits."""
    text = " ".join(text.split())
    if draw.textlength(text, font_size=14) <= width:
        return text
    while text and draw.textlength(text + "...", font_size=14) > width:
        text = text[:-1]
    return text.rstrip() + "..."
