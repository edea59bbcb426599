"""A file that says who is where in a picture of several people (TOML, or the same as JSON), read and checked; no picture is opened.

    pose = "group.jpg"                  # optional: a photo whose faces, from the left, are the people in their order
    pose_names = ["ben", "anna"]        # optional: whose faces they are, from the left

    [[person]]
    name = "anna"
    face = ["anna_1.jpg", "anna_2.jpg"] # one photo or several, or a stored face
    box = [0.0, 0.0, 0.5, 1.0]          # left, top, right, bottom, in parts of the picture; or mask = "anna.png"
    pose = "turned.jpg"                 # optional: whose keypoints are placed in the box; or keypoints = five [x, y]
    ip_adapter_scale = 0.8              # optional, as identitynet_scale: times the option of the same name; or a schedule, "linear(1, 0.3)"

Paths begin at the file's folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from instantid_jax.published import did_you_mean
from instantid_jax.strengths import StrengthError, read_strength

__all__ = ["PeopleFile", "PeopleFileError", "PersonEntry", "read_people_file"]

MOST = 64
"""People in one picture."""
_PERSON = ("name", "face", "face_index", "box", "mask", "pose", "pose_face_index", "keypoints", "identitynet_scale", "ip_adapter_scale")


class PeopleFileError(ValueError):
    """A file that cannot be used; the message names it and the person."""


@dataclasses.dataclass(frozen=True, eq=False)
class PersonEntry:
    """What the file says of one person."""

    name: str
    face: tuple[Path, ...]
    face_index: int | None = None
    box: np.ndarray | None = None
    """[4]: left, top, right, bottom in parts of the picture; it may reach beyond it."""
    mask: Path | None = None
    pose: Path | None = None
    pose_face_index: int | None = None
    keypoints: np.ndarray | None = None
    """[5, 2] in parts of the picture."""
    identitynet_scale: Any = 1.0
    """As of `people.Person`."""
    ip_adapter_scale: Any = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class PeopleFile:
    """Who is in the picture."""

    people: tuple[PersonEntry, ...]
    pose: Path | None = None
    pose_names: tuple[str, ...] | None = None
    """Whose faces the pose shows, from the left; None where it is the people in their order."""

    @property
    def files(self) -> list[Path]:
        """Every file that is named."""
        named = [*(path for person in self.people for path in (*person.face, person.pose, person.mask)), self.pose]
        return [path for path in named if path is not None]


def read_people_file(path: Path) -> PeopleFile:
    """Reads a people file. Raises `PeopleFileError` for what is wrong, and OSError where there is no such file."""
    if path.suffix not in (".toml", ".json") and path.is_file():
        raise PeopleFileError(f"{path}: a file of people is .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PeopleFileError(f"{path}: cannot be read as {'JSON' if path.suffix == '.json' else 'TOML'} ({error})") from error
    try:
        return _people(content, path.parent)
    except ValueError as error:
        raise PeopleFileError(f"{path}: {error}") from error


def _people(content: Any, folder: Path) -> PeopleFile:
    _known(content, ("pose", "pose_names", "person"), "the file")
    listed = content.get("person")
    if not isinstance(listed, list) or not listed:
        raise ValueError("holds no [[person]]")
    if len(listed) > MOST:
        raise ValueError(f"holds {len(listed)} people; at most {MOST} fit in one picture")
    people = tuple(_person(about, number, folder) for number, about in enumerate(listed, 1))
    names = [person.name for person in people]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two people are called {twice!r}")
    pose = _path("pose", content["pose"], folder) if "pose" in content else None
    order = content.get("pose_names")
    if order is not None and (pose is None or not isinstance(order, list) or sorted(map(str, order)) != sorted(names)):
        raise ValueError(f"pose_names goes with pose, and has every name once: {', '.join(names)}")
    for person in people:
        if person.box is None and person.mask is None and pose is None:
            raise ValueError(f"person {person.name}: has no region; give box, mask, or for all people a pose that shows them")
        if person.box is None and person.keypoints is None and pose is None:
            raise ValueError(f"person {person.name}: nothing says where the keypoints are; give box, keypoints, or for all people a pose")
    return PeopleFile(people, pose, None if order is None else tuple(order))


def _person(about: Any, number: int, folder: Path) -> PersonEntry:
    where = f"person {number}"
    _known(about, _PERSON, where)
    name = about.get("name", str(number))
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: name must be a text, not {name!r}")
    where = f"person {name}"
    try:
        faces = about.get("face", [])
        faces = faces if isinstance(faces, list) else [faces]
        if not faces:
            raise ValueError("has no face: name a photo, several of one person, or a stored face")
        for one, other in (("box", "mask"), ("pose", "keypoints")):
            if one in about and other in about:
                raise ValueError(f"has {one} and {other}; give one of them")
        found: dict[str, Any] = {name: _path(name, about[name], folder) for name in ("mask", "pose") if name in about}
        found |= {name: _array(name, about[name], shape) for name, shape in (("box", (4,)), ("keypoints", (5, 2))) if name in about}
        found |= {name: _number(name, about[name], int) for name in ("face_index", "pose_face_index") if name in about}
        found |= {name: _strength(name, about[name]) for name in ("identitynet_scale", "ip_adapter_scale") if name in about}
        return PersonEntry(name, tuple(_path("face", face, folder) for face in faces), **found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _known(about: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(about, dict):
        raise ValueError(f"{where} must have fields, not be {about!r}")
    for name in about:
        if name not in names:
            raise ValueError(f"{where} has an unknown field {name!r}{did_you_mean(name, names)}")


def _path(name: str, value: Any, folder: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a path, not {value!r}")
    return folder / value


def _array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        array = np.zeros(0, np.float32)
    what = "four numbers (left, top, right, bottom)" if shape == (4,) else "five points [x, y]"
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} must be {what}, not {value!r}")
    if shape == (4,) and not (array[0] < array[2] and array[1] < array[3]):
        raise ValueError(f"{name} {value} has no inside; left must be below right, and top below bottom")
    if shape == (4,) and (array[0] >= 1 or array[1] >= 1 or array[2] <= 0 or array[3] <= 0):
        raise ValueError(f"{name} {value} lies outside the picture, which is 0 to 1 across and down")
    if array.min() < -1 or array.max() > 2:
        raise ValueError(f"{name} is in parts of the picture, 0 to 1, not {value!r}")
    return array


def _strength(name: str, value: Any) -> Any:
    """A number, a list of them, or a text; whether it fits the steps and the model, `check_people` sees."""
    try:
        read_strength(value)
    except StrengthError as error:
        raise ValueError(f"{name} {error}") from error
    return value


def _number(name: str, value: Any, kinds: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ValueError(f"{name} must be a {'whole ' if kinds is int else ''}number, not {value!r}")
    return value
