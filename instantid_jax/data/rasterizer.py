"""A z-buffer for triangles, and the shading of the pixels that they cover, compiled with numba.

Two passes: `visible` finds for every sample the nearest triangle, `shade` computes the colour of every sample from the
triangle's interpolated attributes and averages the samples of a pixel. Colour comes from procedures on coordinates that stick to
the surface (`uvw` below), not from the corners of the mesh, so that edges of lips, brows and hair are sharp at every size.

Coordinates: x to the right, y down, in samples; sample (i, j) covers [j, j + 1) x [i, i + 1) and is looked up at its centre.
Depth and normals: z towards the camera. Arrays are float32 unless said otherwise. The functions hold no Python lock, so threads
run at the same time. What they call lies in this file, since numba's cache notices a change of this file only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

__all__ = ["EYE", "GLASSES", "HAIR", "LASH", "SKIN", "Look", "shade", "vertex_normals", "visible"]

SKIN, EYE, LASH, HAIR, GLASSES = 0, 1, 2, 3, 4
"""Materials of triangles. SKIN's `uvw` is the place on the mean head in inter-eye distances (0 between the eyes), EYE's the place
on the eyeball in its radii, HAIR's (angle from the front in radians, 0 crown .. 1 above the ear .. 2 tips, unused)."""

Color = tuple[float, float, float]
"""Red, green, blue from 0 to 1."""


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
    """0 .. 1."""
    beard_density: float
    """0 none .. 1 full; below 0.5 it reads as stubble."""
    moustache_only: float
    """1: of the beard only what grows above the mouth; 0: all."""
    scalp: float
    """How dark the scalp is under the hair: 0 bald .. 1."""
    freckles: float
    """0 none .. 1."""
    wrinkles: float
    """0 none .. 1."""
    gaze_x: float
    """Where the pupils are, in radii of the eyeball to the right ..."""
    gaze_y: float
    """... and up."""
    strands: float
    """Shifts the pattern of the hair's strands; any number."""
    light: Color
    """Unit vector towards the light."""
    ambient: float
    """Light from everywhere, of 1."""


_compiled = njit(cache=True, nogil=True, fastmath=True)


@_compiled
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


@_compiled
def _ramp(low: float, high: float, x: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@_compiled
def _bump(t: float) -> float:
    """1 at t = 0, falling smoothly to 0 at t = 1 and beyond; t is a squared distance."""
    rest = max(1.0 - t, 0.0)
    return rest * rest


@_compiled
def _hash(i: int, j: int) -> float:
    """A fixed pseudo-random number in 0..1 for a cell."""
    value = (i * 374761393 + j * 668265263) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((value ^ (value >> 16)) & 0xFFFF) / 65535.0


@_compiled
def _noise(x: float, y: float) -> float:
    """Smooth noise in 0..1 with one bump a unit."""
    i, j = math.floor(x), math.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    top = _hash(i, j) * (1.0 - u) + _hash(i + 1, j) * u
    bottom = _hash(i, j + 1) * (1.0 - u) + _hash(i + 1, j + 1) * u
    return top * (1.0 - v) + bottom * v


@_compiled
def _edge_at(angle: float, edges: np.ndarray) -> float:
    """Where hair ends, as fall; `edges` [k] covers the angles from -pi to pi."""
    place = int((angle + math.pi) * (len(edges) - 1) / (2.0 * math.pi) + 0.5)
    return edges[min(max(place, 0), len(edges) - 1)]


@_compiled
def visible(
    points: np.ndarray, depth: np.ndarray, uvw: np.ndarray, triangles: np.ndarray, materials: np.ndarray, edges: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest triangle of every sample [side, side] (int32, -1 where none) and the weights of its corners 1 and 2 [side, side, 2].

    points [n, 2], depth [n], uvw [n, 3], triangles [m, 3] int32, materials [m] uint8. Hair beyond its edge is not there: `edges` [k]
    is the fall at which it ends, for k angles from -pi to pi. Skin is seen from outside only.
    """
    nearest = np.full((side, side), -1e30, np.float32)
    owner = np.full((side, side), -1, np.int32)
    weights = np.empty((side, side, 2), np.float32)
    for index in range(len(triangles)):
        a, b, c = triangles[index]
        x0, y0 = points[a, 0], points[a, 1]
        x1, y1, x2, y2 = points[b, 0] - x0, points[b, 1] - y0, points[c, 0] - x0, points[c, 1] - y0
        area = x1 * y2 - x2 * y1
        if abs(area) < 1e-9 or (area > 0.0 and materials[index] == SKIN):
            continue
        left = max(math.ceil(x0 + min(0.0, x1, x2) - 0.5), 0)
        right = min(math.floor(x0 + max(0.0, x1, x2) - 0.5), side - 1)
        top = max(math.ceil(y0 + min(0.0, y1, y2) - 0.5), 0)
        bottom = min(math.floor(y0 + max(0.0, y1, y2) - 0.5), side - 1)
        y2, x2, x1, y1 = y2 / area, x2 / area, x1 / area, y1 / area
        z0, z1, z2 = depth[a], depth[b] - depth[a], depth[c] - depth[a]
        hair = materials[index] == HAIR
        for row in range(top, bottom + 1):
            py = row + 0.5 - y0
            for column in range(left, right + 1):
                px = column + 0.5 - x0
                w1, w2 = px * y2 - x2 * py, x1 * py - px * y1
                if w1 < -1e-5 or w2 < -1e-5 or w1 + w2 > 1.00001:
                    continue
                z = z0 + w1 * z1 + w2 * z2
                if z <= nearest[row, column]:
                    continue
                if hair:
                    angle = uvw[a, 0] + w1 * (uvw[b, 0] - uvw[a, 0]) + w2 * (uvw[c, 0] - uvw[a, 0])
                    fall = uvw[a, 1] + w1 * (uvw[b, 1] - uvw[a, 1]) + w2 * (uvw[c, 1] - uvw[a, 1])
                    if fall > _edge_at(angle, edges):
                        continue
                nearest[row, column] = z
                owner[row, column] = index
                weights[row, column, 0] = w1
                weights[row, column, 1] = w2
    return owner, weights


@_compiled
def _mix(color: Color, other: Color, share: float) -> Color:
    keep = 1.0 - share
    return color[0] * keep + other[0] * share, color[1] * keep + other[1] * share, color[2] * keep + other[2] * share


@_compiled
def _dim(color: Color, factor: float) -> Color:
    return color[0] * factor, color[1] * factor, color[2] * factor


@_compiled
def _complexion(x: float, y: float, z: float, look: Look) -> Color:
    """Bare skin: redder cheeks and nose, darker eye sockets, freckles, wrinkles."""
    side, color = abs(x), look.skin
    flush = _bump(((side - 0.62) ** 2 + (y + 0.62) ** 2) / 0.30)
    if z > 0.4:
        flush = max(flush, 0.8 * _bump((x * x + (y + 0.62) ** 2) / 0.09))
    color = _mix(color, (look.skin[0] * 0.95, look.skin[1] * 0.72, look.skin[2] * 0.70), 0.35 * flush)
    color = _dim(color, 1.0 - 0.16 * _bump((side - 0.5) ** 2 / 0.27 + (y - 0.03) ** 2 / 0.09))
    if look.freckles > 0.0:
        where = _bump((y + 0.42) ** 2 / 0.30 + (side - 0.45) ** 2 / 0.75)
        if where > 0.0:
            spot = _ramp(0.6, 0.9, _noise(x * 24.0 + 40.0, y * 24.0)) * where
            color = _mix(color, (color[0] * 0.72, color[1] * 0.52, color[2] * 0.40), look.freckles * spot)
    if look.wrinkles > 0.0:
        lines = _bump((y - 0.75) ** 2 / 0.15)
        if lines > 0.0:
            lines *= 0.16 * _ramp(0.75, 0.95, math.cos(y * 42.0 + 0.8 * math.cos(x * 4.0)))
        fold = _bump((side - 0.36 + 0.30 * (y + 0.95)) ** 2 / 0.005) * _ramp(-1.35, -1.1, y) * _ramp(-0.5, -0.75, y)
        color = _dim(color, 1.0 - look.wrinkles * (lines + 0.22 * fold))
    return color


@_compiled
def _beard(x: float, y: float, look: Look) -> float:
    """How densely (0..1) the beard grows at a place of the face."""
    side = abs(x)
    upper = _bump((y + 0.93) ** 2 / 0.024) * _ramp(0.52, 0.36, side)
    if look.moustache_only > 0.5:
        return upper
    top = y + 0.35 * max(0.75 - side, 0.0) - 0.25 * _ramp(0.75, 1.0, side)
    ear = _ramp(1.10, 1.18, side) * _ramp(-1.1, -0.9, y)
    return max(_ramp(-0.62, -0.95, top) * _ramp(-2.05, -1.75, y) * (1.0 - ear), upper)


@_compiled
def _brow(x: float, y: float, look: Look) -> float:
    """How densely (0..1) the brow grows at a place of the face: an arch, thinner outside."""
    along = abs(x) - 0.5
    width = look.brow_width * (1.0 - 0.55 * _ramp(0.05, 0.42, along))
    off = (y - 0.335 + 0.42 * (along - 0.06) ** 2) / width
    return _bump(0.5 * off * off * off * off) * _ramp(-0.36, -0.27, along) * _ramp(0.44, 0.33, along)


@_compiled
def _scalp(x: float, y: float, z: float, angle: float, fall: float, grain: float, edges: np.ndarray) -> float:
    """How far (0..1) hair covers skin: a little inside the line where the hair's own mesh ends, and down the temples."""
    cap = _ramp(-0.01, 0.05, _edge_at(angle, edges) - fall) if fall < 1.1 else 0.0
    temple = _ramp(-0.55, -0.75, z + 0.1 * grain) * _ramp(-0.45, -0.1, y) * _ramp(1.42, 1.22, abs(x))
    return max(cap, temple)


@_compiled
def _skin(x: float, y: float, z: float, lip: float, mouth: float, angle: float, fall: float, look: Look, edges: np.ndarray) -> Color:
    """The colour of a place of the mean head; see `shade` for lip .. fall."""
    if y < -2.25 - (0.35 * _ramp(1.2, 0.0, abs(x)) if z > -1.2 else 0.0):
        return look.shirt
    color = _complexion(x, y, z, look) if z > -1.0 else look.skin
    grain = _noise(x * 38.0 + 7.0, y * 38.0)
    if look.beard_density > 0.0 and z > -1.2 and y < -0.4:
        growth = _beard(x, y, look) * (1.0 - lip) * (1.0 - mouth)
        color = _mix(color, _dim(look.beard, 0.7 + 0.6 * grain), min(growth * look.beard_density * (0.85 + 0.3 * grain), 0.95))
    if lip > 0.0:
        color = _mix(color, look.lips, lip)
    if mouth > 0.0:
        color = _mix(color, (0.27, 0.07, 0.08), mouth)
    if z > -0.5 and y > 0.0 and y < 0.6:
        color = _mix(color, _dim(look.brow, 0.75 + 0.5 * grain), _brow(x, y, look) * look.brow_density)
    if look.scalp > 0.0 and y > -0.5:
        color = _mix(color, _dim(look.hair, 0.5 + 0.35 * grain), look.scalp * _scalp(x, y, z, angle, fall, grain, edges))
    return color


@_compiled
def _eyeball(x: float, y: float, z: float, look: Look) -> Color:
    """The colour of an eyeball at a place on the unit sphere, z the axis of sight."""
    dx, dy = x - look.gaze_x, y - look.gaze_y
    radius = math.sqrt(dx * dx + dy * dy) if z > 0.0 else 2.0
    color = _mix((0.91, 0.90, 0.88), _dim(look.iris, 0.5), 1.0 - _ramp(0.52, 0.60, radius))
    color = _mix(color, look.iris, 1.0 - _ramp(0.44, 0.52, radius))
    color = _mix(color, (0.03, 0.03, 0.03), 1.0 - _ramp(0.20, 0.26, radius))
    return _dim(color, 1.0 - 0.35 * _ramp(0.25, 0.75, y))  # the upper lid's shadow


@_compiled
def _hair(angle: float, fall: float, look: Look) -> Color:
    """Strands from the crown to the tips, darker at the roots."""
    strand = 0.6 * _noise(angle * 26.0 + look.strands, fall * 3.0) + 0.4 * _noise(angle * 70.0 + look.strands, fall * 5.0)
    return _dim(look.hair, (0.70 + 0.55 * strand) * (0.85 + 0.15 * _ramp(0.0, 0.35, fall)))


@_compiled
def _lit(color: Color, material: int, x: float, y: float, z: float, look: Look, halfway: Color) -> Color:
    """A colour under the light, for the unit normal (x, y, z): diffuse, darker at grazing angles, with a highlight."""
    diffuse = max(x * look.light[0] + y * look.light[1] + z * look.light[2], 0.0)
    shine = max(x * halfway[0] + y * halfway[1] + z * halfway[2], 0.0)
    bright = (look.ambient + (1.08 - look.ambient) * diffuse) * max(0.80 + 0.20 * z, 0.5)
    gloss = 0.0
    if material == SKIN:
        gloss = 0.10 * shine**24
    elif material == EYE:
        bright = 0.35 + 0.65 * bright
        gloss = 0.85 * shine**60
    elif material == HAIR:
        gloss = (0.05 + 0.16 * (look.hair[0] + look.hair[1] + look.hair[2]) / 3.0) * shine**10
    return min(color[0] * bright + gloss, 1.0), min(color[1] * bright + gloss, 1.0), min(color[2] * bright + gloss, 1.0)


@_compiled
def _sample(
    a: int, b: int, c: int, w1: float, w2: float, material: int, attributes: np.ndarray, look: Look, halfway: Color, edges: np.ndarray
) -> Color:
    """The lit colour of one place of one triangle; attributes [n, 10]: normal, uvw, marks."""
    w0 = 1.0 - w1 - w2
    x = w0 * attributes[a, 0] + w1 * attributes[b, 0] + w2 * attributes[c, 0]
    y = w0 * attributes[a, 1] + w1 * attributes[b, 1] + w2 * attributes[c, 1]
    z = w0 * attributes[a, 2] + w1 * attributes[b, 2] + w2 * attributes[c, 2]
    scale = 1.0 / (math.sqrt(x * x + y * y + z * z) + 1e-12)
    if z < 0.0 and material != SKIN:  # thin sheets are seen from behind
        scale = -scale
    u = w0 * attributes[a, 3] + w1 * attributes[b, 3] + w2 * attributes[c, 3]
    v = w0 * attributes[a, 4] + w1 * attributes[b, 4] + w2 * attributes[c, 4]
    w = w0 * attributes[a, 5] + w1 * attributes[b, 5] + w2 * attributes[c, 5]
    color = (0.08, 0.06, 0.06)
    if material == SKIN:
        lip = w0 * attributes[a, 6] + w1 * attributes[b, 6] + w2 * attributes[c, 6]
        mouth = w0 * attributes[a, 7] + w1 * attributes[b, 7] + w2 * attributes[c, 7]
        angle = w0 * attributes[a, 8] + w1 * attributes[b, 8] + w2 * attributes[c, 8]
        fall = w0 * attributes[a, 9] + w1 * attributes[b, 9] + w2 * attributes[c, 9]
        color = _skin(u, v, w, lip, mouth, angle, fall, look, edges)
    elif material == EYE:
        color = _eyeball(u, v, w, look)
    elif material == HAIR:
        color = _hair(u, v, look)
    elif material == GLASSES:
        color = look.glasses
    return _lit(color, material, x * scale, y * scale, z * scale, look, halfway)


@_compiled
def shade(
    owner: np.ndarray,
    weights: np.ndarray,
    attributes: np.ndarray,
    triangles: np.ndarray,
    materials: np.ndarray,
    look: Look,
    edges: np.ndarray,
    backdrop: np.ndarray,
    samples: int,
) -> np.ndarray:
    """The picture [s, s, 3] in 0..1 of what `visible` found: s = side / samples, backdrop [s, s, 3] behind everything.

    attributes [n, 10]: the unit normal; `uvw`; how far skin belongs to the lips and to the inside of the mouth (0..1); and where skin
    lies among the hair (angle and fall, as HAIR's `uvw`).
    """
    size = len(owner) // samples
    out = np.empty((size, size, 3), np.float32)
    hx, hy, hz = look.light[0], look.light[1], look.light[2] + 1.0
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    halfway = (hx / length, hy / length, hz / length)
    share = 1.0 / (samples * samples)
    for row in range(size):
        for column in range(size):
            red, green, blue = 0.0, 0.0, 0.0
            for sub in range(samples * samples):
                i, j = row * samples + sub // samples, column * samples + sub % samples
                index = owner[i, j]
                if index < 0:
                    lit = (float(backdrop[row, column, 0]), float(backdrop[row, column, 1]), float(backdrop[row, column, 2]))
                else:
                    a, b, c = triangles[index]
                    lit = _sample(a, b, c, weights[i, j, 0], weights[i, j, 1], int(materials[index]), attributes, look, halfway, edges)
                red, green, blue = red + lit[0], green + lit[1], blue + lit[2]
            out[row, column, 0] = red * share
            out[row, column, 1] = green * share
            out[row, column, 2] = blue * share
    return out
