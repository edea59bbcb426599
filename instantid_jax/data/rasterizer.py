"""A z-buffer for triangles, and the shading of the pixels that they cover, compiled with numba.

Two passes: `visible` finds for every sample the nearest triangle, `shade` computes the colour of every sample from the
triangle's interpolated attributes and averages the samples of a pixel. Colour comes from procedures on coordinates that stick to
the surface (`uvw` below), not from the corners of the mesh, so that edges of lips, brows and hair are sharp at every size.

Coordinates: x to the right, y down, in samples; sample (i, j) covers [j, j + 1) x [i, i + 1) and is looked up at its centre.
Depth and normals: z towards the camera. All arrays are float32 unless said otherwise. The functions hold no Python lock.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

__all__ = ["EYE", "GLASSES", "HAIR", "LASH", "SKIN", "TEETH", "HairLine", "Look", "hair_edges", "shade", "vertex_normals", "visible"]

SKIN, EYE, LASH, TEETH, HAIR, GLASSES = 0, 1, 2, 3, 4, 5
"""Materials of triangles. SKIN's `uvw` is the place on the mean head in inter-eye distances (0 between the eyes), EYE's the place
on the eyeball in its radii, HAIR's (angle from the front in radians, 0 crown .. 1 above the ear .. 2 tips, side of the parting)."""

Color = tuple[float, float, float]
"""Red, green, blue from 0 to 1."""

_FAST = {"cache": True, "nogil": True, "fastmath": True}


class HairLine(NamedTuple):
    """Where hair grows: on the strip of `uvw` = (angle, fall, _) between the crown and the edge that these numbers draw."""

    forehead: float
    """Where it ends above the forehead, as fall."""
    tips: float
    """Where it ends at the sides and behind, as fall."""
    opening: float
    """Half the angle of the face's window, radians."""
    parting: float
    """Angle by which the middle of the forehead's line is moved to a side."""
    fray: float
    """How uneven the edge is, in falls."""
    phase: float
    """Shifts the pattern of the strands."""


class Look(NamedTuple):
    """Everything that colours a head; one value for a whole picture."""

    skin: Color
    lips: Color
    brow: Color
    beard: Color
    iris: Color
    hair: Color
    shirt: Color
    glasses: Color
    brow_width: float
    """In inter-eye distances."""
    brow_density: float
    beard_density: float
    """0 none .. 1 full; below 0.5 it reads as stubble."""
    moustache_only: float
    scalp: float
    """How dark the scalp is under the hair: 0 bald .. 1."""
    freckles: float
    wrinkles: float
    gaze_x: float
    gaze_y: float
    light: Color
    """Unit vector towards the light."""
    ambient: float


@njit(**_FAST)
def vertex_normals(positions: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """[n, 3] unit normals of [n, 3] positions: the sum over the triangles [m, 3] (int32) that touch a vertex, weighted by their area."""
    normals = np.zeros_like(positions)
    for index in range(len(triangles)):
        a, b, c = triangles[index]
        ux, uy, uz = positions[b, 0] - positions[a, 0], positions[b, 1] - positions[a, 1], positions[b, 2] - positions[a, 2]
        vx, vy, vz = positions[c, 0] - positions[a, 0], positions[c, 1] - positions[a, 1], positions[c, 2] - positions[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for corner in (a, b, c):
            normals[corner, 0] += nx
            normals[corner, 1] += ny
            normals[corner, 2] += nz
    for index in range(len(normals)):
        x, y, z = normals[index]
        scale = 1.0 / (math.sqrt(x * x + y * y + z * z) + 1e-12)
        normals[index, 0] = x * scale
        normals[index, 1] = y * scale
        normals[index, 2] = z * scale
    return normals


@njit(**_FAST)
def _ramp(low: float, high: float, x: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@njit(**_FAST)
def _hash(i: int, j: int) -> float:
    """A fixed pseudo-random number in 0..1 for a cell."""
    value = math.sin(i * 127.1 + j * 311.7) * 43758.5453
    return value - math.floor(value)


@njit(**_FAST)
def _noise(x: float, y: float) -> float:
    """Smooth noise in 0..1 with one bump a unit."""
    i, j = math.floor(x), math.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    top = _hash(i, j) * (1.0 - u) + _hash(i + 1, j) * u
    bottom = _hash(i, j + 1) * (1.0 - u) + _hash(i + 1, j + 1) * u
    return top * (1.0 - v) + bottom * v


@njit(**_FAST)
def _hair_edge(angle: float, line: HairLine) -> float:
    """The fall at which hair ends, for an angle from the front."""
    side = abs(angle)
    window = _ramp(line.opening * 0.72, line.opening, side)
    arch = 0.10 * _ramp(0.0, 0.8, abs(angle - line.parting))
    forehead = line.forehead + arch
    edge = forehead + (line.tips - forehead) * window
    return edge + line.fray * (_noise(angle * 9.0 + line.phase, line.phase) - 0.5) + 0.5 * line.fray * (_noise(angle * 31.0 + line.phase, 3.0) - 0.5)


@njit(**_FAST)
def hair_edges(angles: np.ndarray, line: HairLine) -> np.ndarray:
    """Where hair ends, as fall, for angles from the front [k]."""
    edges = np.empty(len(angles), np.float32)
    for index in range(len(angles)):
        edges[index] = _hair_edge(angles[index], line)
    return edges


@njit(**_FAST)
def visible(
    points: np.ndarray,
    depth: np.ndarray,
    uvw: np.ndarray,
    triangles: np.ndarray,
    materials: np.ndarray,
    line: HairLine,
    side: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest triangle of every sample [side, side] (int32, -1 where none) and the weights of its corners 1 and 2 [side, side, 2].

    points [n, 2], depth [n], uvw [n, 3], triangles [m, 3] int32, materials [m] uint8. Hair beyond its edge is not there.
    """
    nearest = np.full((side, side), -1e30, np.float32)
    owner = np.full((side, side), -1, np.int32)
    weights = np.empty((side, side, 2), np.float32)
    for index in range(len(triangles)):
        a, b, c = triangles[index]
        x0, y0, x1, y1, x2, y2 = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        left, right = max(math.ceil(min(x0, x1, x2) - 0.5), 0), min(math.floor(max(x0, x1, x2) - 0.5), side - 1)
        top, bottom = max(math.ceil(min(y0, y1, y2) - 0.5), 0), min(math.floor(max(y0, y1, y2) - 0.5), side - 1)
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                px, py = column + 0.5 - x0, row + 0.5 - y0
                w1 = (px * (y2 - y0) - (x2 - x0) * py) / area
                w2 = ((x1 - x0) * py - px * (y1 - y0)) / area
                w0 = 1.0 - w1 - w2
                if w0 < -1e-5 or w1 < -1e-5 or w2 < -1e-5:
                    continue
                z = w0 * depth[a] + w1 * depth[b] + w2 * depth[c]
                if z <= nearest[row, column]:
                    continue
                if materials[index] == HAIR:
                    angle = w0 * uvw[a, 0] + w1 * uvw[b, 0] + w2 * uvw[c, 0]
                    fall = w0 * uvw[a, 1] + w1 * uvw[b, 1] + w2 * uvw[c, 1]
                    if fall > _hair_edge(angle, line):
                        continue
                nearest[row, column] = z
                owner[row, column] = index
                weights[row, column, 0] = w1
                weights[row, column, 1] = w2
    return owner, weights


@njit(**_FAST)
def _mix(color: Color, other: Color, share: float) -> Color:
    keep = 1.0 - share
    return color[0] * keep + other[0] * share, color[1] * keep + other[1] * share, color[2] * keep + other[2] * share


@njit(**_FAST)
def _dim(color: Color, factor: float) -> Color:
    return color[0] * factor, color[1] * factor, color[2] * factor


@njit(**_FAST)
def _skin(x: float, y: float, z: float, lip: float, mouth: float, look: Look, line: HairLine) -> Color:
    """The colour of skin at a place of the mean head; lip and mouth (0..1) say how far it belongs to the lips and the mouth's inside."""
    side = abs(x)
    color = look.skin
    flush = math.exp(-((side - 0.62) ** 2 + (y + 0.62) ** 2) / 0.10) + 0.8 * math.exp(-(x * x + (y + 0.62) ** 2) / 0.03) * (1.0 if z > 0.4 else 0.0)
    color = _mix(color, (look.skin[0] * 0.95, look.skin[1] * 0.72, look.skin[2] * 0.70), 0.35 * min(flush, 1.0))
    hollow = math.exp(-((side - 0.5) ** 2) / 0.09 - (y - 0.03) ** 2 / 0.03)
    color = _dim(color, 1.0 - 0.16 * hollow)
    if look.freckles > 0.0 and z > -0.3 and y < 0.1 and y > -0.9:
        spot = _noise(x * 22.0 + 40.0, y * 22.0) * math.exp(-((y + 0.4) ** 2) / 0.12)
        color = _dim(color, 1.0 - look.freckles * _ramp(0.48, 0.68, spot))
    if look.wrinkles > 0.0:
        forehead = math.exp(-((y - 0.75) ** 2) / 0.05) * _ramp(0.75, 0.95, math.cos(y * 42.0 + 0.8 * math.cos(x * 4.0)))
        fold = math.exp(-((side - 0.36 + 0.30 * (y + 0.95)) ** 2) / 0.0016) * _ramp(-1.35, -1.1, y) * _ramp(-0.5, -0.75, y)
        color = _dim(color, 1.0 - look.wrinkles * (0.16 * forehead + 0.22 * fold * (1.0 if z > -0.3 else 0.0)))
    grain = _noise(x * 38.0 + 7.0, y * 38.0)
    if z > -1.2:
        lower = _ramp(-0.62, -0.95, y + 0.35 * max(0.75 - side, 0.0) - 0.25 * _ramp(0.75, 1.0, side)) * _ramp(-2.05, -1.75, y) * (1.0 - 0.0 * side)
        upper = math.exp(-((y + 0.93) ** 2) / 0.008) * _ramp(0.52, 0.36, side)
        growth = max(lower * (1.0 - look.moustache_only), upper) * (1.0 - lip) * (1.0 - mouth)
        color = _mix(color, _dim(look.beard, 0.7 + 0.6 * grain), min(growth * look.beard_density * (0.85 + 0.3 * grain), 0.95))
    color = _mix(color, look.lips, lip)
    color = _mix(color, (0.27, 0.07, 0.08), mouth)
    along = side - 0.5
    if z > -0.5 and along > -0.36 and along < 0.44:
        width = look.brow_width * (1.0 - 0.55 * _ramp(0.05, 0.42, along))
        off = (y - 0.335 + 0.42 * (along - 0.06) ** 2) / width
        brow = math.exp(-off * off * off * off) * _ramp(-0.36, -0.27, along) * _ramp(0.44, 0.33, along)
        color = _mix(color, _dim(look.brow, 0.75 + 0.5 * grain), brow * look.brow_density)
    if look.scalp > 0.0:
        above = _ramp(0.98, 1.12, y - 0.25 * _ramp(0.5, 1.0, side) + 0.06 * grain)
        temple = _ramp(-0.62, -0.8, z + 0.1 * grain) * _ramp(-0.35, 0.0, y) * _ramp(1.42, 1.22, side)
        color = _mix(color, _dim(look.hair, 0.55 + 0.3 * grain), look.scalp * max(above, temple))
    if y < -2.25 - 0.35 * _ramp(1.2, 0.0, side) * (1.0 if z > -1.2 else 0.0):
        color = look.shirt
    return color


@njit(**_FAST)
def _eyeball(x: float, y: float, z: float, look: Look) -> Color:
    """The colour of an eyeball at a place on the unit sphere, z the axis of sight."""
    dx, dy = x - look.gaze_x, y - look.gaze_y
    radius = math.sqrt(dx * dx + dy * dy) if z > 0.0 else 2.0
    color = _mix((0.91, 0.90, 0.88), _dim(look.iris, 0.5), 1.0 - _ramp(0.52, 0.60, radius))
    color = _mix(color, look.iris, 1.0 - _ramp(0.44, 0.52, radius))
    color = _mix(color, (0.03, 0.03, 0.03), 1.0 - _ramp(0.20, 0.26, radius))
    return _dim(color, 1.0 - 0.35 * _ramp(0.25, 0.75, y))  # the upper lid's shadow


@njit(**_FAST)
def _hair(angle: float, fall: float, look: Look, line: HairLine) -> Color:
    strand = 0.6 * _noise(angle * 26.0 + line.phase, fall * 3.0) + 0.4 * _noise(angle * 70.0 + line.phase, fall * 5.0)
    root = 0.85 + 0.15 * _ramp(0.0, 0.35, fall)
    return _dim(look.hair, (0.70 + 0.55 * strand) * root)


@njit(**_FAST)
def _lit(color: Color, material: int, nx: float, ny: float, nz: float, look: Look, halfway: Color, fall: float) -> Color:
    """Diffuse light, a little occlusion at grazing angles, and a highlight."""
    diffuse = max(nx * look.light[0] + ny * look.light[1] + nz * look.light[2], 0.0)
    shine = max(nx * halfway[0] + ny * halfway[1] + nz * halfway[2], 0.0)
    occlusion = max(0.80 + 0.20 * nz, 0.5)
    shade = (look.ambient + (1.08 - look.ambient) * diffuse) * occlusion
    gloss = 0.0
    if material == SKIN:
        gloss = 0.10 * shine**24
    elif material == EYE:
        shade = 0.35 + 0.65 * shade
        gloss = 0.85 * shine**60
    elif material == HAIR:
        gloss = (0.05 + 0.16 * (look.hair[0] + look.hair[1] + look.hair[2]) / 3.0) * shine**10
    return color[0] * shade + gloss, color[1] * shade + gloss, color[2] * shade + gloss


@njit(**_FAST)
def shade(
    owner: np.ndarray,
    weights: np.ndarray,
    normals: np.ndarray,
    uvw: np.ndarray,
    masks: np.ndarray,
    triangles: np.ndarray,
    materials: np.ndarray,
    look: Look,
    line: HairLine,
    backdrop: np.ndarray,
    samples: int,
) -> np.ndarray:
    """The picture [s, s, 3] in 0..1 of what `visible` found: s = side / samples, backdrop [s, s, 3] behind everything.

    normals [n, 3]; masks [n, 2] (lips, inside of the mouth).
    """
    size = len(owner) // samples
    out = np.empty((size, size, 3), np.float32)
    hx, hy, hz = look.light[0], look.light[1], look.light[2] + 1.0
    length = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-12
    halfway = (hx / length, hy / length, hz / length)
    share = 1.0 / (samples * samples)
    for row in range(size):
        for column in range(size):
            red, green, blue = 0.0, 0.0, 0.0
            for sub in range(samples * samples):
                i, j = row * samples + sub // samples, column * samples + sub % samples
                index = owner[i, j]
                if index < 0:
                    red += backdrop[row, column, 0]
                    green += backdrop[row, column, 1]
                    blue += backdrop[row, column, 2]
                    continue
                a, b, c = triangles[index]
                w1, w2 = weights[i, j, 0], weights[i, j, 1]
                w0 = 1.0 - w1 - w2
                u = w0 * uvw[a, 0] + w1 * uvw[b, 0] + w2 * uvw[c, 0]
                v = w0 * uvw[a, 1] + w1 * uvw[b, 1] + w2 * uvw[c, 1]
                w = w0 * uvw[a, 2] + w1 * uvw[b, 2] + w2 * uvw[c, 2]
                nx = w0 * normals[a, 0] + w1 * normals[b, 0] + w2 * normals[c, 0]
                ny = w0 * normals[a, 1] + w1 * normals[b, 1] + w2 * normals[c, 1]
                nz = w0 * normals[a, 2] + w1 * normals[b, 2] + w2 * normals[c, 2]
                scale = 1.0 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-12)
                material = materials[index]
                if nz < 0.0 and material != SKIN:  # thin sheets are seen from behind
                    scale = -scale
                if material == SKIN:
                    lip = w0 * masks[a, 0] + w1 * masks[b, 0] + w2 * masks[c, 0]
                    mouth = w0 * masks[a, 1] + w1 * masks[b, 1] + w2 * masks[c, 1]
                    color = _skin(u, v, w, lip, mouth, look, line)
                elif material == EYE:
                    color = _eyeball(u, v, w, look)
                elif material == HAIR:
                    color = _hair(u, v, look, line)
                elif material == TEETH:
                    color = (0.80, 0.77, 0.71)
                elif material == GLASSES:
                    color = look.glasses
                else:
                    color = (0.08, 0.06, 0.06)
                lit = _lit(color, material, nx * scale, ny * scale, nz * scale, look, halfway, v)
                red += min(lit[0], 1.0)
                green += min(lit[1], 1.0)
                blue += min(lit[2], 1.0)
            out[row, column, 0] = red * share
            out[row, column, 1] = green * share
            out[row, column, 2] = blue * share
    return out
