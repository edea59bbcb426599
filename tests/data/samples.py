"""Small photos whose "faces" a stand-in analyzer finds by colour, so that preparing needs no models and every figure is known."""

import io

import numpy as np
from PIL import Image

from instantid_jax.data.record import CachedLatents, Record, View
from instantid_jax.face import Face
from instantid_jax.face.align import ARCFACE_TEMPLATE

FACE_COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40)]


class ColorAnalyzer:
    """Takes each uniformly coloured rectangle of `FACE_COLORS` for a face; its embedding is the colour."""

    name = "colors"
    embedding_dim = 3

    def analyze(self, image, det_size=640):
        del det_size
        faces = []
        for color in FACE_COLORS:
            rows, columns = np.nonzero((np.abs(image.astype(int) - color) < 12).all(axis=-1))
            if len(rows) < 16:
                continue
            x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            kps = (ARCFACE_TEMPLATE / 112 * (x1 - x0, y1 - y0) + (x0, y0)).astype(np.float32)
            faces.append(Face(np.array([x0, y0, x1, y1], np.float32), kps, 0.9, np.array(color, np.float32)))
        return faces


class WordTokenizer:
    """One id a word, from its letters; counts its calls."""

    def __init__(self, pad):
        self.pad, self.calls = pad, 0

    def encode(self, texts):
        self.calls += 1
        rows = np.full((len(texts), 77), self.pad, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [1, *(sum(map(ord, word)) for word in text.split()), 2]
            row[: len(ids)] = ids
        return rows


def photo(boxes, size=(64, 48), background=(90, 90, 90), seed=0):
    """A Pillow picture of `size` (width, height) with coloured boxes ((x0, y0, x1, y1), face number) on noise around `background`."""
    noise = np.random.default_rng(seed).integers(-12, 13, (size[1], size[0], 3))
    pixels = np.clip(np.array(background) + noise, 0, 255).astype(np.uint8)
    for (x0, y0, x1, y1), number in boxes:
        pixels[y0:y1, x0:x1] = FACE_COLORS[number]
    return Image.fromarray(pixels)


def encoded(image, form="PNG", **options):
    """A picture's file, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def record(i, size=(48, 64), cached=None, **fields):
    """Record number i with a face in the middle; `cached` is the (height, width) of a view whose latents it holds instead of a photo."""
    height, width = size
    box = np.array([width / 4, height / 4, 3 * width / 4, 3 * height / 4], np.float32)
    kps = (ARCFACE_TEMPLATE / 112 * (width / 2, height / 2) + (width / 4, height / 4)).astype(np.float32)
    corners = tuple(int(v) for v in box)
    values = {
        "key": f"record-{i:05d}",
        "image": b"" if cached else encoded(photo([(corners, i % 4)], (width, height), seed=i)),
        "size": size,
        "keypoints": kps,
        "face_box": box,
        "embeddings": np.full((1, 8), i + 1, np.float32),
        "embedder": "colors",
        "caption": f"photo number {i}",
        "caption_identity": f"photo number {i} of an old man",
        "identity": f"person {i // 3}",
    }
    if cached:
        h, w = cached
        mean = np.full((h // 8, w // 8, 4), i, np.float32)
        values["latents"] = CachedLatents(mean, -mean, View(h, w, 0, 0, h, w), "vae")
    return Record(**{**values, **fields})


def tokenizers():
    """Two stand-ins that differ in padding, as SDXL's do."""
    return WordTokenizer(2), WordTokenizer(0)
