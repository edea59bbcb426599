"""A world of procedural portraits: endless people, each seen in endless views, with captions and exact keypoints.

What makes a person who they are (the shape of the head, skin, brows, beard, eyes, lips) belongs to the `Identity`; what a prompt
may ask for (hair, background, expression, style) belongs to the `View`, as do pose and light. So a model that is given a face
embedding and a prompt can be tested: the first must carry the identity, the second the view.

    world = PortraitWorld(image_size=128)
    person = world.identity(2000)
    view = world.view(person, 0)
    portrait = world.render(person, view)
    print(world.caption(person, view, identity_words=False))

Everything follows from integer seeds. Rendering needs numba (``pip install "instantid_jax[train]"``); nothing else here does.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from instantid_jax.data.portrait_asset import ETHNICITIES
from instantid_jax.data.portrait_head import HairLine, Heads, glasses_mesh, glasses_vertices, hair_mesh, hair_vertices, load_heads
from instantid_jax.data.portrait_styles import STYLES, apply_style

__all__ = ["BACKGROUNDS", "EXPRESSIONS", "HAIR_COLORS", "HAIR_STYLES", "Identity", "Portrait", "PortraitWorld", "View", "split"]

HAIR_STYLES = ("bald", "short", "medium", "long")
HAIR_COLORS = {
    "black": (26, 22, 22),
    "brown": (96, 60, 34),
    "blond": (222, 182, 104),
    "red": (176, 66, 26),
    "gray": (134, 134, 136),
    "white": (232, 232, 228),
}
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "white": (240, 240, 240),
    "black": (16, 16, 16),
    "red": (190, 48, 48),
    "green": (58, 150, 70),
    "blue": (52, 90, 190),
    "yellow": (228, 206, 66),
    "purple": (130, 68, 162),
}
EXPRESSIONS: dict[str, dict[str, float]] = {
    "neutral": {"mouthSmileLeft": 0.12, "mouthSmileRight": 0.12},  # the mesh's own corners of the mouth hang
    "smiling": {"mouthSmileLeft": 0.85, "mouthSmileRight": 0.85, "cheekSquintLeft": 0.5, "cheekSquintRight": 0.5},
    "surprised": {"jawOpen": 0.35, "browInnerUp": 0.8, "browOuterUpLeft": 0.6, "browOuterUpRight": 0.6, "eyeWideLeft": 0.7, "eyeWideRight": 0.7},
    "frowning": {"browDownLeft": 0.9, "browDownRight": 0.9, "mouthFrownLeft": 0.7, "mouthFrownRight": 0.7},
    "mouth open": {"jawOpen": 0.5},
}
BEARDS = ("none", "stubble", "full", "moustache")

_SKIN = np.array([(247, 214, 194), (239, 198, 170), (222, 174, 138), (194, 138, 102), (150, 100, 70), (106, 70, 50), (76, 50, 40)]) / 255
_SKIN_TONE = np.array([(4.5, 0.8), (1.5, 0.7), (0.8, 0.55)])  # place among _SKIN, mean and deviation, as ETHNICITIES
_EYES = {"brown": (84, 50, 26), "blue": (84, 134, 196), "green": (88, 138, 84), "gray": (126, 136, 144)}
_EYE_CHANCE = np.array([(0.92, 0.02, 0.03, 0.03), (0.90, 0.03, 0.04, 0.03), (0.32, 0.36, 0.20, 0.12)])
_BROW_CHANCE = np.array([(0.85, 0.12, 0.0, 0.0, 0.03), (0.82, 0.13, 0.0, 0.0, 0.05), (0.18, 0.40, 0.22, 0.12, 0.08)])
_BEARD_CHANCE = (0.52, 0.16, 0.20, 0.12)
_PART_SHARE = {"head": 0.5, "forehead": 0.5, "mouth": 0.65}  # of the shape's strength; a mouth must leave room for expressions
_SHIRT = (0.20, 0.21, 0.24)
_WITHOUT_COLOR = ("sketch", "noir")  # styles that do not show a background's colour
_GLASSES = (0.06, 0.06, 0.07)
_EYE_HEIGHT = 0.50  # of the picture, from the top
_MARGIN, _LOWERED = 0.03, 0.06  # wanted above the head, and how far a tall head is lowered for it, in image sides
_CAMERA = 14.0  # distance in inter-eye distances
_TURNING_POINT = 1.2  # behind the eyes, in inter-eye distances
_MEDIUM_LENGTH, _LONG_LENGTH = 1.75, 3.4

_IDENTITY_STREAM, _VIEW_STREAM, _STYLE_STREAM = 1, 2, 3
_TEST_SEEDS, _VALIDATION_SEEDS = range(1000), range(1000, 2000)

Color = tuple[float, float, float]


# Words for the axes of a head's shape that a recogniser notices most: number of the axis, word above, word below the middle.
_SHAPE_WORDS = (
    (10, "wide face", "narrow face"),
    (18, "downturned brows", "upturned brows"),
    (20, "high brows", "low brows"),
    (36, "wide-set eyes", "close-set eyes"),
    (46, "upturned nose", "drooping nose"),
    (50, "long nose", "short nose"),
    (57, "wide nose", "narrow nose"),
    (61, "full cheeks", "hollow cheeks"),
    (74, "wide mouth", "small mouth"),
    (77, "high mouth", "low mouth"),
    (85, "long chin", "short chin"),
    (90, "wide jaw", "narrow jaw"),
)
_NOTABLE = 0.7  # standard deviations from the middle at which a word is said


class PortraitError(ValueError):
    """A portrait that cannot be made as asked."""


def split(identity_seed: int) -> str:
    """The split of an identity: 0 to 999 "test", 1000 to 1999 "validation", from 2000 on "train". No person is in two of them."""
    if identity_seed < 0:
        raise PortraitError(f"split: identity seeds are 0 or more, got {identity_seed}")
    if identity_seed in _TEST_SEEDS:
        return "test"
    return "validation" if identity_seed in _VALIDATION_SEEDS else "train"


@dataclass(frozen=True, eq=False)
class Identity:
    """A person. Colours are red, green, blue in 0..1."""

    seed: int
    sex: str
    """Either "man" or "woman"."""
    age: float
    """0 (about 20 years) to 1 (about 80)."""
    ethnicity: np.ndarray
    """[3] shares of african, asian, caucasian, which sum to 1."""
    weight: float
    """-1 thin .. 1 heavy."""
    vertices: np.ndarray
    """[n, 3] float32: the head without an expression."""
    skin: Color
    lips: Color
    brow: Color
    brow_color: str
    brow_width: float
    """In inter-eye distances."""
    brow_density: float
    beard: str
    """One of `BEARDS`."""
    beard_density: float
    eyes: Color
    eye_color: str
    freckles: float
    shape_words: tuple[str, ...]
    """What is notable about the head's shape, such as "long nose"."""

    @property
    def age_word(self) -> str:
        """ "young", "middle-aged" or "old"."""
        return "young" if self.age < 0.35 else "middle-aged" if self.age < 0.68 else "old"

    @property
    def ethnicity_word(self) -> str:
        """The largest share's name."""
        return ETHNICITIES[int(self.ethnicity.argmax())]


@dataclass(frozen=True)
class View:
    """How a person is seen. Angles in radians, colours in 0..1."""

    seed: int
    style: str
    hair_style: str
    hair_color: str
    hair: Color
    background: str
    backdrop: Color
    expression: str
    glasses: bool
    yaw: float
    """Positive turns the nose to the image's right."""
    pitch: float
    """Positive looks down."""
    roll: float
    """Positive leans the head to the image's left."""
    zoom: float
    shift: tuple[float, float]
    """Of the face, in image sides, right and down."""
    light: Color
    """Unit vector towards the light: right, up, to the camera."""
    ambient: float
    hair_line: HairLine
    hair_thickness: float
    """In inter-eye distances."""
    hair_length: float
    """Of the hanging part, in inter-eye distances."""
    hair_flare: float


@dataclass(frozen=True, eq=False)
class Portrait:
    """A picture and where its five points are."""

    image: np.ndarray
    """[s, s, 3] uint8, RGB."""
    keypoints: np.ndarray
    """[5, 2] float32, x then y in pixels: image-left eye, image-right eye, nose tip, left and right mouth corner.

    Pixel (row i, column j) covers [j, j + 1) x [i, i + 1), so its centre is at + 0.5 and truncation names the pixel a point lies in,
    as `face.keypoints.draw_kps` does."""


@dataclass(frozen=True)
class PortraitWorld:
    """What people and views there are. Two worlds with the same fields give the same portraits."""

    image_size: int = 64
    """Side of the pictures in pixels."""
    supersample: int = 3
    """Samples a pixel along each side."""
    yaw: float = 15.0
    """Largest turn to a side, degrees."""
    pitch: float = 8.0
    """Largest nod, degrees."""
    roll: float = 6.0
    """Largest lean, degrees."""
    eye_distance: float = 0.23
    """Between the eyes of a face seen from the front, in image sides, before the zoom."""
    zoom: tuple[float, float] = (0.92, 1.08)
    """Smallest and largest enlargement."""
    jitter: float = 0.015
    """Largest shift of the face, in image sides."""
    shape_strength: float = 0.34
    """Standard deviation of the axes of a head's shape, whose full range is -1..1; outline and mouth get less of it."""
    expressions: tuple[str, ...] = ("neutral", "smiling")
    """Drawn from, equally often; of `EXPRESSIONS`."""
    glasses_rate: float = 0.0
    """Share of views with glasses."""
    style_weights: tuple[tuple[str, float], ...] = (("photo", 0.6), ("sketch", 0.1), ("noir", 0.1), ("watercolor", 0.1), ("pixel art", 0.1))
    """How often each style is drawn; the weights need not sum to 1."""

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.supersample < 1:
            raise PortraitError(
                f"PortraitWorld: image_size must be 8 or more and supersample 1 or more, got {self.image_size} and {self.supersample}"
            )
        for word, known, used in (
            ("expression", tuple(EXPRESSIONS), self.expressions),
            ("style", STYLES, tuple(name for name, _ in self.style_weights)),
        ):
            unknown = [name for name in used if name not in known]
            if unknown or not used:
                raise PortraitError(f"PortraitWorld: unknown {word} {unknown}; known: {', '.join(known)}")

    def identity(self, seed: int) -> Identity:
        """The person of a seed (0 or more)."""
        random = _generator(_IDENTITY_STREAM, seed)
        heads = load_heads()
        sex = ("woman", "man")[int(random.integers(2))]
        age = float(random.beta(1.1, 1.5))
        ethnicity = random.dirichlet(np.full(len(ETHNICITIES), 0.3))
        weight = float(random.uniform(-0.8, 0.8))
        share = np.array([_PART_SHARE.get(name.split("/")[0], 1.0) for name in heads.axis_names])
        axes = np.clip(random.normal(0, self.shape_strength, len(share)) * share, -1, 1).astype(np.float32)
        said = axes / (self.shape_strength * share)
        shape_words = tuple(high if said[i] > 0 else low for i, high, low in _SHAPE_WORDS if abs(said[i]) > _NOTABLE)
        maleness = float(random.uniform(0.75, 1.0))
        coefficients = heads.coefficients(axes, ethnicity, maleness if sex == "man" else 1 - maleness, age, weight)
        skin = _skin_color(ethnicity, random)
        eye_color = str(random.choice(list(_EYES), p=ethnicity @ _EYE_CHANCE))
        brow_color = str(random.choice(list(HAIR_COLORS)[:5], p=ethnicity @ _BROW_CHANCE))
        if random.random() < 0.8 * max(age - 0.6, 0) / 0.4:
            brow_color = "gray"
        redness = random.uniform(0.0, 1.0)
        lips = skin * (0.86 - 0.10 * redness, 0.66 - 0.22 * redness, 0.66 - 0.16 * redness) + (0.04, 0.0, 0.01)
        bearded = str(random.choice(BEARDS, p=_BEARD_CHANCE))
        density = {"none": 0.0, "stubble": random.uniform(0.25, 0.4), "full": random.uniform(0.8, 0.95), "moustache": random.uniform(0.8, 0.95)}
        beard = bearded if sex == "man" else "none"
        freckles = float(random.uniform(0.4, 0.8)) if random.random() < 0.3 * ethnicity[2] else 0.0
        return Identity(
            seed, sex, age, ethnicity, weight, heads.vertices(coefficients), _color(skin), _color(lips),
            _color(np.array(HAIR_COLORS[brow_color]) / 255 * 0.8), brow_color, float(random.uniform(0.055, 0.13)), float(random.uniform(0.6, 0.95)),
            beard, float(density[beard]), _color(np.array(_EYES[eye_color]) / 255 * random.uniform(0.8, 1.2)), eye_color, freckles,
            shape_words,
        )  # fmt: skip

    def view(self, identity: Identity, seed: int) -> View:
        """View number `seed` (0 or more) of a person. Nothing of it tells who the person is, but that few women are bald."""
        random = _generator(_VIEW_STREAM, identity.seed, seed)
        names, weights = zip(*self.style_weights, strict=True)
        style = str(random.choice(names, p=np.array(weights) / sum(weights)))
        hair_style = str(random.choice(HAIR_STYLES, p=(0.16, 0.40, 0.22, 0.22) if identity.sex == "man" else (0.04, 0.24, 0.34, 0.38)))
        hair_color, background = str(random.choice(list(HAIR_COLORS))), str(random.choice(list(BACKGROUNDS)))
        hair = np.clip(np.array(HAIR_COLORS[hair_color]) / 255 * random.uniform(0.9, 1.1), 0, 1)
        backdrop = np.clip((np.array(BACKGROUNDS[background]) + random.normal(0, 7, 3)) / 255, 0, 1)
        expression = str(random.choice(self.expressions))
        yaw, pitch, roll = (float(random.uniform(-1, 1) * np.radians(most)) for most in (self.yaw, self.pitch, self.roll))
        light = np.array([random.uniform(-0.8, 0.8), random.uniform(0.0, 0.8), 0.85])
        tips = {"bald": 0.0, "short": 1.0, "medium": 1.97, "long": 1.99}[hair_style]
        line = HairLine(
            forehead=float(random.uniform(0.58, 0.74)),
            tips=tips,
            opening=float(random.uniform(1.12, 1.3)),
            parting=float(random.uniform(-0.45, 0.45)),
            fray=float(random.uniform(0.02, 0.06)),
            phase=float(random.uniform(0, 50)),
        )
        length = {"medium": _MEDIUM_LENGTH, "long": _LONG_LENGTH}.get(hair_style, 1.0) * random.uniform(0.9, 1.1)
        shift = (float(random.uniform(-1, 1) * self.jitter), float(random.uniform(-1, 1) * self.jitter))
        return View(
            seed, style, hair_style, hair_color, _color(hair), background, _color(backdrop), expression,
            bool(random.random() < self.glasses_rate), yaw, pitch, roll, float(random.uniform(*self.zoom)), shift,
            _color(light / np.linalg.norm(light)), float(random.uniform(0.42, 0.62)), line,
            float(random.uniform(0.10, 0.24)), float(length), float(random.uniform(-0.1, 0.25)),
        )  # fmt: skip

    def render(self, identity: Identity, view: View, size: int | None = None) -> Portrait:
        """The portrait, `size` (default `image_size`) pixels wide and high. Raises `PortraitError` without numba."""
        rasterizer = _import_rasterizer()
        size = self.image_size if size is None else size
        heads, edges = load_heads(), view.hair_line.edges()
        mesh = _dressed(heads, identity, view, rasterizer, edges)
        turned, points = self._project(heads, mesh.vertices, view)
        side = size * self.supersample
        owner, weights = rasterizer.visible(points * np.float32(side), turned[:, 2], mesh.uvw, mesh.triangles, mesh.materials, edges, side)
        attributes = np.concatenate([rasterizer.vertex_normals(turned, mesh.triangles), mesh.uvw, mesh.marks], axis=1)
        look, backdrop = _look(rasterizer, identity, view), _backdrop(view, size)
        picture = rasterizer.shade(owner, weights, attributes, mesh.triangles, mesh.materials, look, edges, backdrop, self.supersample)
        image = apply_style(view.style, picture, _generator(_STYLE_STREAM, identity.seed, view.seed))
        keypoints = np.concatenate([points[heads.eyes].mean(1), points[heads.corners]]) * size
        return Portrait(image, keypoints.astype(np.float32))

    def _project(self, heads: Heads, vertices: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [n, 3] turned as the view says, and where the camera sees them.

        The first in inter-eye distances from the middle between the eyes, the second [n, 2] in image sides, x right and y down.
        """
        centers = heads.eye_centers(vertices)
        unit = np.linalg.norm(centers[1] - centers[0])
        pivot = centers.mean(0) - np.array([0, 0, _TURNING_POINT * unit])
        turned = ((vertices - pivot) / unit).astype(np.float32) @ _rotation(view.yaw, view.pitch, view.roll).T
        turned[:, 2] -= np.float32(_TURNING_POINT)
        turned = np.ascontiguousarray(turned)
        scale = self.eye_distance * view.zoom * _CAMERA / (_CAMERA - turned[:, 2])
        x = 0.5 + view.shift[0] + turned[:, 0] * scale
        y = _EYE_HEIGHT + view.shift[1] - turned[:, 1] * scale
        y += np.clip(_MARGIN - y.min(), 0, _LOWERED)
        return turned, np.stack([x, y], 1).astype(np.float32)

    def caption(self, identity: Identity, view: View, identity_words: bool) -> str:
        """The prompt of a portrait; `identity_words` adds what tells who it is: age, ethnicity, sex, beard and looks."""
        prefix = {"photo": "photo", "sketch": "pencil sketch", "noir": "film noir photo", "watercolor": "watercolor painting"}.get(
            view.style, view.style
        )
        words = [identity.age_word, identity.ethnicity_word, identity.sex] if identity_words else ["person"]
        if view.hair_style == "bald":
            words.insert(0, "bald")
        extras = []
        if identity_words and identity.beard != "none":
            extras.append({"stubble": "stubble", "full": "a beard", "moustache": "a moustache"}[identity.beard])
        if view.hair_style != "bald":
            extras.append(f"{view.hair_style} {view.hair_color} hair")
        if view.glasses:
            extras.append("glasses")
        person = " ".join(words)
        article = "an" if person[0] in "aeiou" else "a"
        start = f"{prefix} of {article} {person}" + (f" with {' and '.join(extras)}" if extras else "")
        if identity_words:
            start += ", " + ", ".join(self._looks(identity))
        expression = "neutral expression" if view.expression == "neutral" else view.expression
        setting = "" if view.style in _WITHOUT_COLOR else f", {view.background} background"
        return f"{start}, {expression}{setting}"

    def _looks(self, identity: Identity) -> list[str]:
        """What can be said of a face: its colours, and what is notable about its shape."""
        light = np.dot(identity.skin, (0.3, 0.6, 0.1))
        skin = "dark" if light < 0.38 else "tan" if light < 0.62 else "fair"
        brows = "thick" if identity.brow_width > 0.1 else "thin" if identity.brow_width < 0.075 else "medium"
        return [f"{skin} skin", f"{identity.eye_color} eyes", f"{brows} {identity.brow_color} brows", *identity.shape_words]

    def labels(self, identity: Identity, view: View) -> dict[str, str]:
        """What is drawn, one word or two for each attribute."""
        return {
            "sex": identity.sex,
            "age": identity.age_word,
            "ethnicity": identity.ethnicity_word,
            "beard": identity.beard,
            "eye_color": identity.eye_color,
            "hair_style": view.hair_style,
            "hair_color": view.hair_color,
            "background": view.background,
            "expression": view.expression,
            "glasses": "glasses" if view.glasses else "none",
            "style": view.style,
        }

    def split(self, identity_seed: int) -> str:
        """See `split`."""
        return split(identity_seed)


def _generator(*seeds: int) -> np.random.Generator:
    if min(seeds) < 0:
        raise PortraitError(f"portraits: seeds are 0 or more, got {min(seeds)}")
    return np.random.default_rng(list(seeds))


def _color(values: Any) -> Color:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _skin_color(ethnicity: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[3] in 0..1: a tone by ethnicity, a little warmer or cooler, more or less saturated."""
    mean, deviation = ethnicity @ _SKIN_TONE
    place = float(np.clip(mean + deviation * random.normal(), 0, len(_SKIN) - 1))
    tone = np.array([np.interp(place, np.arange(len(_SKIN)), _SKIN[:, channel]) for channel in range(3)])
    warm, saturation = random.normal(0, 0.022), random.uniform(0.85, 1.2)
    return np.clip(tone.mean() + (tone - tone.mean()) * saturation + np.array([0.6, 0.0, -1.0]) * warm, 0.08, 0.98)


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """[3, 3] float32: yaw first, then pitch, then roll."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (lean @ nod @ turn).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Mesh:
    """What is drawn; see `rasterizer.visible` and `rasterizer.shade`. The head's vertices come first."""

    vertices: np.ndarray
    triangles: np.ndarray
    materials: np.ndarray
    uvw: np.ndarray
    marks: np.ndarray

    def plus(self, vertices: np.ndarray, triangles: np.ndarray, material: int, uvw: np.ndarray) -> _Mesh:
        """With one more thing of one material."""
        return _Mesh(
            np.concatenate([self.vertices, vertices]),
            np.concatenate([self.triangles, triangles + np.int32(len(self.vertices))]),
            np.concatenate([self.materials, np.full(len(triangles), material, np.uint8)]),
            np.concatenate([self.uvw, uvw]),
            np.concatenate([self.marks, np.zeros((len(vertices), self.marks.shape[1]), np.float32)]),
        )


def _dressed(heads: Heads, identity: Identity, view: View, rasterizer: Any, edges: np.ndarray) -> _Mesh:
    """The head with the view's expression, hair and glasses."""
    vertices = identity.vertices + _expression(view.expression)
    mesh = _Mesh(vertices, heads.triangles, heads.materials, heads.rest, heads.marks)
    if view.hair_style != "bald":
        triangles, uvw = hair_mesh()
        grown = hair_vertices(heads, vertices, edges, view.hair_thickness, view.hair_length, view.hair_flare)
        mesh = mesh.plus(grown, triangles, rasterizer.HAIR, uvw)
    if view.glasses:
        worn = glasses_vertices(heads, vertices)
        mesh = mesh.plus(worn, glasses_mesh(), rasterizer.GLASSES, np.zeros_like(worn))
    return mesh


@functools.cache
def _expression(name: str) -> np.ndarray:
    return load_heads().expression(EXPRESSIONS[name])


def _look(rasterizer: Any, identity: Identity, view: View) -> Any:
    return rasterizer.Look(
        skin=identity.skin,
        lips=identity.lips,
        brow=identity.brow,
        beard=identity.brow,
        iris=identity.eyes,
        hair=view.hair,
        shirt=_SHIRT,
        glasses=_GLASSES,
        brow_width=identity.brow_width,
        brow_density=identity.brow_density,
        beard_density=identity.beard_density,
        moustache_only=float(identity.beard == "moustache"),
        scalp=0.0 if view.hair_style == "bald" else 0.9,
        freckles=identity.freckles,
        wrinkles=max(identity.age - 0.4, 0) / 0.6,
        gaze_x=-0.7 * math.sin(view.yaw),  # the eyes seek the camera
        gaze_y=0.7 * math.sin(view.pitch),
        strands=view.hair_line.phase,
        light=view.light,
        ambient=view.ambient,
    )


def _backdrop(view: View, size: int) -> np.ndarray:
    """[size, size, 3] float32: the background, a little lighter on the light's side."""
    across = np.linspace(-1, 1, size, dtype=np.float32)
    strength = 0.0 if view.style == "pixel art" else 0.08  # few colours would make a glow a stain
    glow = 1 + strength * (across[None] * view.light[0] - across[:, None] * view.light[1])
    return np.clip(np.array(view.backdrop, np.float32) * glow[..., None], 0, 1).astype(np.float32)


def _import_rasterizer() -> Any:
    try:
        return importlib.import_module("instantid_jax.data.rasterizer")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        raise PortraitError('rendering portraits needs numba, which is not installed; pip install "instantid_jax[train]"') from error
