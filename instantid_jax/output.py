"""Pictures on disk: PNG files that carry their settings, and contact sheets.

A PNG holds two text chunks: `parameters`, in the form that other tools for Stable Diffusion read, and `instantid_jax`,
the same settings and more as JSON. Neither holds the face vector, only a hash of the photo. Files appear whole or not at
all, and equal settings give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from instantid_jax.face import load_photo


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
        "version": "Version",
    }
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{title}: {settings[key]}" for key, title in names.items() if key in settings))
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


def save_run(out: Path, images: Sequence[Image.Image], keypoints: Image.Image, faces: Sequence[Path], settings: Mapping[str, Any]) -> list[Path]:
    """The pictures of one run and their contact sheet, each with all settings inside; photos appear only by their hash.

    Picture i is named by its own seed, ``settings["seed"] + i``. Returns the paths, the sheet last.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k not in ("out", "face", "num_images")}
    settings |= {
        "size": f"{images[0].width}x{images[0].height}",
        "photos_sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in faces],
    }
    seeds = [settings["seed"] + i for i in range(len(images))]
    paths = [out / f"{seed:06d}.png" for seed in seeds]
    for path, image, seed in zip(paths, images, seeds, strict=True):
        save_png(image, path, settings | {"seed": seed})
    shown = [(f"photo: {path.name}", load_photo(path)) for path in faces if path.suffix not in (".npz", ".npy")]
    shown += [("keypoints", keypoints), *((f"seed {seed}, {settings['model']}", image) for seed, image in zip(seeds, images, strict=True))]
    save_png(contact_sheet(shown), out / "sheet.png", settings)
    return [*paths, out / "sheet.png"]


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
