"""Pictures on disk: PNG files that carry their settings, and contact sheets.

A PNG holds two text chunks: `parameters`, in the form that other tools for Stable Diffusion read, and `instantid_jax`,
the same settings and more as JSON. Of the files that went in (photos, control pictures, weights) they hold names or hashes, no
folders and no face vector; the contact sheet shows the photos. Files appear whole or not at all, and equal settings give equal
bytes. No picture is written over one with other settings: its name gets a number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from instantid_jax.face import load_photo

__all__ = [
    "contact_sheet",
    "file_digest",
    "free_path",
    "parameters_text",
    "read_settings",
    "run_settings",
    "save_png",
    "save_run",
    "weights_digest",
    "without_folders",
]


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
        "version": "Version",
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    told = {title: settings[key] for key, title in names.items() if settings.get(key) not in (None, [], (), False)}
    lines.append(", ".join(f"{title}: {value}" for title, value in told.items()))
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG with its settings inside; through a temporary file, so that a broken write leaves nothing behind."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt("instantid_jax", json.dumps(settings, sort_keys=True, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        image.save(temporary, format="PNG", pnginfo=info, compress_level=6)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON settings of a PNG that `save_png` wrote. Raises ValueError where there are none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        text = getattr(image, "text", {}).get("instantid_jax")
    if text is None:
        raise ValueError(f"{path} holds no instantid_jax settings")
    return json.loads(text)


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


def weights_digest(folder: Path) -> dict[str, str]:
    """{"weights_sha256": ...} of the manifest that `convert_weights` wrote, or of a small model's one file; nothing for other folders."""
    for name in ("manifest.json", "weights.safetensors"):
        if (folder / name).is_file():
            return {"weights_sha256": file_digest(folder / name)}
    return {}


def save_run(
    out: Path,
    images: Sequence[Image.Image],
    keypoints: Image.Image,
    inputs: Mapping[str, Sequence[Path]],
    settings: Mapping[str, Any],
) -> list[Path]:
    """The pictures of one run and their contact sheet, each with all settings inside.

    `inputs` are the picture files that went in, by what they are ("face", "pose", "control"): their SHA-256 is stored as
    ``face_sha256`` and so on, and those that are pictures are shown on the sheet, by their file's name. Of other paths in
    `settings` the last part is stored. Picture i is named by its own seed, ``settings["seed"] + i``. Returns the paths, the
    sheet last.
    """
    settings = run_settings(images[0].size, inputs, settings)
    seeds = [(settings["seed"] + i) % 2**32 for i in range(len(images))]  # they wrap as the pipeline's do
    paths = [free_path(out / f"{seed:06d}.png", settings | {"seed": seed}) for seed in seeds]
    for path, image, seed in zip(paths, images, seeds, strict=True):
        save_png(image, path, settings | {"seed": seed})
    given = [(kind, path) for kind, files in inputs.items() for path in files if path.suffix not in (".npz", ".npy", ".toml", ".json")]
    shown = [(f"{kind}: {path.name}", load_photo(path)) for kind, path in given]
    shown += [("keypoints", keypoints), *((f"seed {seed}, {settings['model']}", image) for seed, image in zip(seeds, images, strict=True))]
    sheet = free_path(out / "sheet.png", settings)
    save_png(contact_sheet(shown), sheet, settings)
    return [*paths, sheet]


def run_settings(size: tuple[int, int], inputs: Mapping[str, Sequence[Path]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are stored: of paths the last part, the pictures' (width, height), hashes of the files that went in."""
    told = {k: without_folders(v) for k, v in settings.items()} | {"size": f"{size[0]}x{size[1]}"}
    return told | {f"{kind}_sha256": [file_digest(path) for path in paths] for kind, paths in inputs.items() if paths}


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
    """Labelled pictures in a grid: each fitted into a square of `side` pixels, its label below."""
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
        draw.text((left, top + side + 4), text, fill="black", font_size=14)
    return sheet
