"""The shape of a head: MakeHuman's mesh moved by targets, hair grown on its skull, and its five keypoints.

Lengths are in the mesh's decimetres, x to the image's right, y up, z to the front; "inter-eye distances" are used where heads are
compared. The *rest place* of a vertex is its place on the mean head in inter-eye distances from the middle between the eyes: it
names a spot of the face (a brow, the chin) whatever the shape of the head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np

from instantid_jax.data.portrait_asset import AGES, ETHNICITIES, FACE_UNITS, SEXES, WEIGHTS

__all__ = ["HAIR_COLUMNS", "HAIR_ROWS", "HairLine", "Heads", "glasses_mesh", "glasses_vertices", "hair_mesh", "hair_vertices", "load_heads"]

HAIR_COLUMNS = 49
"""Columns of the hair's grid, from behind over the image's left and the front to behind; the first and the last are one place."""
HAIR_ROWS = 20
"""Rows of the hair's grid: `_CAP_ROWS` on the skull, the others hanging."""

EDGE_ANGLES = 2049
"""How finely the hair's edge is given."""

_CAP_ROWS = 12
_SKULL_CENTER = np.array([0.0, 0.55, -1.2], np.float32)  # rest place
_CAP_ANGLE = np.radians(98.0)  # from the crown to the end of the cap, just above the ears
_EARS_END = 0.1  # rest height above which only skull is left
_NOSE_TIP = np.array([0.0, -0.6, 0.72], np.float32)  # rest place
_TAPER = 5.0  # how fast hair rises from its edge
_EYE_RADIUS = 0.262  # of the eyeball, in inter-eye distances


@dataclass(frozen=True, eq=False)
class Heads:
    """The mesh and everything that moves it; n vertices, m triangles, k targets."""

    base: np.ndarray
    """[n, 3] the base mesh."""
    targets: np.ndarray
    """[k, n * 3] displacements."""
    axis_names: tuple[str, ...]
    """Names of the axes of shape, "part/feature"."""
    axis_rows: np.ndarray
    """[axes, 2] the targets of an axis' negative and positive side, -1 where a side does not exist."""
    triangles: np.ndarray
    """[m, 3] int32."""
    materials: np.ndarray
    """[m] uint8, in the rasterizer's numbers."""
    marks: np.ndarray
    """[n, 4]: lips and inside of the mouth in 0..1, angle and fall on the hair's grid; the last four of `rasterizer.shade`'s attributes."""
    eyes: np.ndarray
    """[2, e] the vertices of the eyeballs, image-left first."""
    rest: np.ndarray
    """[n, 3] rest places; on the eyeballs the place on the unit sphere instead."""
    corners: np.ndarray
    """[3] the vertices of nose tip, left and right mouth corner."""
    cap: np.ndarray
    """[rows, columns, 3] the vertices of the skull's triangle under each place of the hair's cap."""
    cap_weights: np.ndarray
    """[rows, columns, 3] how the place lies between them."""

    @property
    def macro_offset(self) -> int:
        """Row of the first target that belongs to no axis: [ethnicity, sex, age], then [sex, age, weight], then the face units."""
        return int(self.axis_rows.max()) + 1

    def coefficients(self, axes: np.ndarray, ethnicity: np.ndarray, sex: float, age: float, weight: float) -> np.ndarray:
        """[k] for values on the axes [axes] (in -1..1), shares [3] that sum to 1, sex (0 female, 1 male), age (0 young, 1 old), weight in -1..1."""
        out = np.zeros(len(self.targets), np.float32)
        for side, strength in enumerate((np.maximum(-axes, 0), np.maximum(axes, 0))):
            rows = self.axis_rows[:, side]
            out[rows[rows >= 0]] = strength[rows >= 0]
        sexes, ages = np.array([1 - sex, sex]), np.array([1 - age, age])
        weights = np.array([max(-weight, 0), 1 - abs(weight), max(weight, 0)])
        start = self.macro_offset
        middle = start + len(ETHNICITIES) * len(SEXES) * len(AGES)
        out[start:middle] = np.einsum("e,s,a->esa", ethnicity, sexes, ages).ravel()
        out[middle : middle + len(SEXES) * len(AGES) * len(WEIGHTS)] = np.einsum("s,a,w->saw", sexes, ages, weights).ravel()
        return out

    def vertices(self, coefficients: np.ndarray) -> np.ndarray:
        """[n, 3] for coefficients [k]."""
        return self.base + (coefficients @ self.targets).reshape(-1, 3)

    def expression(self, units: Mapping[str, float]) -> np.ndarray:
        """[n, 3] displacement for strengths of face units."""
        first = len(self.targets) - len(FACE_UNITS)
        moved = np.zeros_like(self.base)
        for unit, strength in units.items():
            moved += np.float32(strength) * self.targets[first + FACE_UNITS.index(unit)].reshape(-1, 3)
        return moved

    def eye_centers(self, vertices: np.ndarray) -> np.ndarray:
        """[2, 3]."""
        return vertices[self.eyes].mean(1)


def _mean_head(base: np.ndarray, targets: np.ndarray, offset: int) -> np.ndarray:
    ethnic = len(ETHNICITIES) * len(SEXES) * len(AGES)
    bodies = targets[offset + ethnic :][: len(SEXES) * len(AGES) * len(WEIGHTS)].reshape(-1, len(WEIGHTS), base.size)
    moved = targets[offset : offset + ethnic].mean(0) + bodies[:, WEIGHTS.index("average")].mean(0)
    return base + moved.reshape(base.shape)


def _cap(rest: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rays from the skull's centre leave the skull: corners [rows, columns, 3] and their weights."""
    skull = triangles[rest[triangles][..., 1].min(1) > _EARS_END]
    polar = np.linspace(0.02, _CAP_ANGLE, _CAP_ROWS)[:, None]
    angle = np.linspace(-np.pi, np.pi, HAIR_COLUMNS)[None]
    rays = np.stack(np.broadcast_arrays(np.sin(polar) * np.sin(angle), np.cos(polar), np.sin(polar) * np.cos(angle)), -1).reshape(-1, 3)
    a, b, c = (rest[skull[:, corner]] - _SKULL_CENTER for corner in range(3))
    # A ray r hits the plane of a, b, c where w @ (a, b, c) is a multiple of r with all weights w of one sign.
    weights = np.stack([rays @ np.cross(b, c).T, rays @ np.cross(c, a).T, rays @ np.cross(a, b).T], -1)
    inside = weights.min(-1) / (np.abs(weights).sum(-1) + 1e-12)
    best = inside.argmax(1)
    chosen = weights[np.arange(len(rays)), best]
    chosen = np.maximum(chosen, 0)
    chosen /= chosen.sum(-1, keepdims=True)
    shape = (_CAP_ROWS, HAIR_COLUMNS, 3)
    return skull[best].reshape(shape), chosen.reshape(shape).astype(np.float32)


@functools.cache
def load_heads() -> Heads:
    """The heads of `assets/portraits/heads.npz`, read once."""
    with resources.files("instantid_jax").joinpath("assets/portraits/heads.npz").open("rb") as file, np.load(file) as data:
        base = data["vertices"]
        targets = data["targets"].transpose(0, 2, 1).reshape(len(data["targets"]), -1) * data["target_steps"][:, None]
        quads = data["quads"].astype(np.int32)
        materials, masks, eyes = data["materials"], data["masks"].astype(np.float32) / 255, data["eyes"].astype(np.int64)
        names, rows = tuple(str(name) for name in data["axis_names"]), data["axis_rows"].astype(np.int64)
    mean = _mean_head(base, targets, int(rows.max()) + 1)
    centers = mean[eyes].mean(1)
    distance = np.linalg.norm(centers[1] - centers[0])
    rest = ((mean - centers.mean(0)) / distance).astype(np.float32)
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    materials = np.tile(materials, 2)
    real = (triangles[:, 0] != triangles[:, 2]) & (triangles[:, 1] != triangles[:, 2])
    triangles, materials = triangles[real], materials[real]
    skin = np.unique(triangles[materials == 0])
    lips = skin[masks[0, skin] > 0.5]
    corners = np.array([skin[np.linalg.norm(rest[skin] - _NOSE_TIP, axis=1).argmin()], lips[rest[lips, 0].argmin()], lips[rest[lips, 0].argmax()]])
    cap, cap_weights = _cap(rest, triangles[materials == 0])
    x, y, z = (rest - _SKULL_CENTER).T
    marks = np.stack([*masks, np.arctan2(x, z), np.arctan2(np.hypot(x, z), y) / _CAP_ANGLE], -1).astype(np.float32)
    for eye in eyes:
        rest[eye] = (rest[eye] - rest[eye].mean(0)) / _EYE_RADIUS
    return Heads(base, targets, names, rows, triangles.astype(np.int32), materials, marks, eyes, rest, corners, cap, cap_weights)


@functools.cache
def hair_mesh() -> tuple[np.ndarray, np.ndarray]:
    """Triangles [m, 3] int32 of the hair's grid, and its uvw [n, 3]: angle, fall, 0."""
    angle = np.linspace(-np.pi, np.pi, HAIR_COLUMNS)
    fall = np.concatenate([np.linspace(0, 1, _CAP_ROWS), 1 + np.linspace(0, 1, HAIR_ROWS - _CAP_ROWS + 1)[1:]])
    uvw = np.stack([np.tile(angle, HAIR_ROWS), np.repeat(fall, HAIR_COLUMNS), np.zeros(HAIR_ROWS * HAIR_COLUMNS)], -1)
    index = np.arange(HAIR_ROWS * HAIR_COLUMNS).reshape(HAIR_ROWS, HAIR_COLUMNS)
    a, b, c, d = (part.ravel() for part in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]))
    triangles = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])
    return triangles.astype(np.int32), uvw.astype(np.float32)


class HairLine(NamedTuple):
    """Where hair ends, on the grid whose places are (angle from the front, fall: 0 crown, 1 above the ears, 2 tips)."""

    forehead: float
    """Where it ends above the middle of the forehead, as fall."""
    tips: float
    """Where it ends at the sides and behind, as fall."""
    opening: float
    """Half the width of the face's window, radians."""
    parting: float
    """Angle by which the middle of the forehead's line is moved to a side."""
    fray: float
    """How uneven the edge is, in falls."""
    phase: float
    """Shifts the unevenness; any number."""

    def edges(self) -> np.ndarray:
        """[`EDGE_ANGLES`] float32: where it ends, as fall, for angles from -pi to pi."""
        angle = np.linspace(-np.pi, np.pi, EDGE_ANGLES)
        window = _smooth((np.abs(angle) / self.opening - 0.72) / 0.28)
        forehead = self.forehead + 0.10 * _smooth(np.abs(angle - self.parting) / 0.8)
        uneven = sum(part * np.sin(rate * angle + turn * self.phase) for part, rate, turn in ((0.4, 7.3, 1), (0.3, 29, 2.3), (0.3, 71, 3.7)))
        return (forehead + (self.tips - forehead) * window + self.fray * uneven).astype(np.float32)


def _smooth(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def hair_vertices(heads: Heads, vertices: np.ndarray, edges: np.ndarray, thickness: float, length: float, flare: float) -> np.ndarray:
    """[rows * columns, 3]: the hair's grid on a head [n, 3].

    `edges` is `HairLine.edges`; where the hair ends it lies on the skin. `thickness`, `length` (below the cap) and `flare` (how
    far the tips stand out) are in inter-eye distances.
    """
    centers = heads.eye_centers(vertices)
    unit = float(np.linalg.norm(centers[1] - centers[0]))
    center = centers.mean(0) + _SKULL_CENTER * unit
    skull = np.einsum("rcv,rcvx->rcx", heads.cap_weights, vertices[heads.cap])
    outward = skull - center
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    fall = np.linspace(0, 1, _CAP_ROWS, dtype=np.float32)[:, None]
    edge = edges[np.linspace(0, EDGE_ANGLES - 1, HAIR_COLUMNS).round().astype(int)]
    lift = 0.03 + thickness * (1 - np.exp(-_TAPER * np.maximum(edge[None] - fall, 0)))
    cap = skull + outward * (lift * unit)[..., None]
    down = np.linspace(0, 1, HAIR_ROWS - _CAP_ROWS + 1, dtype=np.float32)[1:, None]
    sideways = cap[-1] - center
    sideways[:, 1] = 0
    sideways /= np.linalg.norm(sideways, axis=-1, keepdims=True)
    out = unit * (0.16 * np.minimum(3 * down, 1) + flare * down**2)
    hanging = cap[-1][None] + sideways[None] * out[..., None]
    hanging[..., 1] -= unit * length * down
    return np.concatenate([cap, hanging]).reshape(-1, 3).astype(np.float32)


_RIM = 28  # corners of a lens
_LENS = np.array([0.40, 0.31], np.float32)  # half axes, in inter-eye distances
_FRAME = 0.045  # half the width of the frame
_BEFORE_THE_EYE = 0.40


@functools.cache
def _glasses() -> tuple[np.ndarray, np.ndarray]:
    """Places [n, 3] on the mean head, and triangles [m, 3], of two rims, the bridge and the temples."""
    angle = np.linspace(0, 2 * np.pi, _RIM, endpoint=False)
    around = np.stack([np.cos(angle), np.sin(angle)], -1)
    around *= (np.abs(around) ** 3).sum(-1, keepdims=True) ** (-1 / 3)  # rounder than a rectangle, squarer than an ellipse
    places, triangles = [], []
    first = np.arange(_RIM)
    after = np.roll(first, -1)
    for eye in (-0.5, 0.5):
        start = 2 * _RIM * len(places)
        flat = np.concatenate([around * (_LENS - _FRAME), around * (_LENS + _FRAME)]) + np.array([eye, -0.03])
        places.append(np.column_stack([flat, _BEFORE_THE_EYE - 0.25 * np.maximum(np.abs(flat[:, 0]) - 0.5, 0)]))
        inner, outer = start + first, start + _RIM + first
        inner_next, outer_next = start + after, start + _RIM + after
        triangles += [np.stack([inner, outer, outer_next], -1), np.stack([inner, outer_next, inner_next], -1)]
    edge, half = 0.5 + float(_LENS[0]), _FRAME
    bars = [[(-0.12, 0.05 - half), (-0.12, 0.05 + half), (0.12, 0.05 + half), (0.12, 0.05 - half)]]
    boxes = [np.column_stack([np.array(bars[0]), np.full(4, _BEFORE_THE_EYE)])]
    for side in (-1.0, 1.0):
        front, back = _BEFORE_THE_EYE - 0.1, -1.0
        boxes.append(np.array([(side * edge, y, front) for y in (-half, half)] + [(side * 1.12, y, back) for y in (half, -half)]))
    for box in boxes:
        start = sum(map(len, places))
        places.append(box)
        triangles.append(np.array([(start, start + 1, start + 2), (start, start + 2, start + 3)]))
    return np.concatenate(places).astype(np.float32), np.concatenate(triangles).astype(np.int32)


def glasses_mesh() -> np.ndarray:
    """Triangles [m, 3] int32 of a pair of glasses."""
    return _glasses()[1]


def glasses_vertices(heads: Heads, vertices: np.ndarray) -> np.ndarray:
    """[n, 3] float32: glasses before the eyes of a head [n, 3]."""
    centers = heads.eye_centers(vertices)
    unit = float(np.linalg.norm(centers[1] - centers[0]))
    return (centers.mean(0) + _glasses()[0] * unit).astype(np.float32)
