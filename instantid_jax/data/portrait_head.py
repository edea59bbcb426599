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

import numpy as np

from instantid_jax.data.portrait_asset import AGES, ETHNICITIES, FACE_UNITS, SEXES, WEIGHTS

__all__ = ["HAIR_COLUMNS", "HAIR_ROWS", "Heads", "hair_vertices", "load_heads"]

HAIR_COLUMNS = 49
"""Columns of the hair's grid, from behind over the image's left and the front to behind; the first and the last are one place."""
HAIR_ROWS = 20
"""Rows of the hair's grid: `_CAP_ROWS` on the skull, the others hanging."""

_CAP_ROWS = 12
_SKULL_CENTER = np.array([0.0, 0.55, -1.2], np.float32)  # rest place
_CAP_ANGLE = np.radians(98.0)  # from the crown to the end of the cap, just above the ears
_EARS_END = 0.1  # rest height above which only skull is left
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
    masks: np.ndarray
    """[n, 2] in 0..1: lips, inside of the mouth."""
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
        used = np.flatnonzero(coefficients)
        return self.base + (coefficients[used] @ self.targets[used]).reshape(-1, 3)

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
        materials, masks, eyes = data["materials"], data["masks"].T.astype(np.float32) / 255, data["eyes"].astype(np.int64)
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
    middle = skin[(np.abs(rest[skin, 0]) < 0.05) & (rest[skin, 1] < -0.3)]
    lips = skin[masks[skin, 0] > 0.5]
    corners = np.array([middle[rest[middle, 2].argmax()], lips[rest[lips, 0].argmin()], lips[rest[lips, 0].argmax()]])
    cap, cap_weights = _cap(rest, triangles[materials == 0])
    for eye in eyes:
        rest[eye] = (rest[eye] - rest[eye].mean(0)) / _EYE_RADIUS
    return Heads(base, targets, names, rows, triangles.astype(np.int32), materials, masks, eyes, rest, corners, cap, cap_weights)


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


def hair_vertices(heads: Heads, vertices: np.ndarray, edge: np.ndarray, thickness: float, length: float, flare: float) -> np.ndarray:
    """[rows * columns, 3]: the hair's grid on a head [n, 3].

    `edge` [columns] is where the hair ends, as fall; there it lies on the skin. `thickness`, `length` (below the cap) and `flare` (how
    far the tips stand out) are in inter-eye distances.
    """
    centers = heads.eye_centers(vertices)
    unit = float(np.linalg.norm(centers[1] - centers[0]))
    center = centers.mean(0) + _SKULL_CENTER * unit
    skull = np.einsum("rcv,rcvx->rcx", heads.cap_weights, vertices[heads.cap])
    outward = skull - center
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    fall = np.linspace(0, 1, _CAP_ROWS, dtype=np.float32)[:, None]
    lift = 0.03 + thickness * (1 - np.exp(-7 * np.maximum(edge[None] - fall, 0)))
    cap = skull + outward * (lift * unit)[..., None]
    down = np.linspace(0, 1, HAIR_ROWS - _CAP_ROWS + 1, dtype=np.float32)[1:, None]
    sideways = cap[-1] - center
    sideways[:, 1] = 0
    sideways /= np.linalg.norm(sideways, axis=-1, keepdims=True)
    out = unit * (0.16 * np.minimum(3 * down, 1) + flare * down**2)
    hanging = cap[-1][None] + sideways[None] * out[..., None]
    hanging[..., 1] -= unit * length * down
    return np.concatenate([cap, hanging]).reshape(-1, 3).astype(np.float32)
