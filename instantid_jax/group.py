"""From a people file to what the pipeline takes for several people: everybody's identity, keypoints and region on one canvas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.face import Face, FaceAnalyzer, FaceError, Identity, KeypointError, box_mask, find_faces, load_photo, resize_img
from instantid_jax.people import Person
from instantid_jax.people_file import PeopleFile, PersonEntry
from instantid_jax.references import Frame, on_canvas, read_identity, read_mask

__all__ = ["Canvas", "assigned_faces", "group_of", "keypoints_in_box"]


class Canvas(NamedTuple):
    """How pictures of a model are framed."""

    width: int | None
    height: int | None
    long_side: int
    """Of a picture with the proportions of a group photo, where neither width nor height is given; without one, of each place beside another."""
    keypoint_scale: float
    frame: Frame | None
    """As of `references.on_canvas`."""


def group_of(listed: PeopleFile, analyzer: Callable[[], FaceAnalyzer], embedding_dim: int, canvas: Canvas) -> tuple[list[Person], Image.Image]:
    """Everybody as the pipeline takes them, and a picture of all their keypoints. Raises the face package's errors, naming the person."""
    faces: list[Face | None] = [None] * len(listed.people)
    if listed.pose is not None:
        photo = resize_img(load_photo(listed.pose))
        found = find_faces(analyzer(), photo, name=str(listed.pose))
        faces = list(assigned_faces(listed, found))
        whole = Identity(found[0].embedding, found[0], photo.size, analyzer().name)
        size, moved = on_canvas(whole, canvas.width, canvas.height, canvas.long_side)
    else:
        size = canvas.width or canvas.long_side * (len(faces) if canvas.frame else 1), canvas.height or canvas.long_side
        moved = np.asarray
    people, drawn = [], np.zeros((size[1], size[0], 3), np.uint8)
    for entry, face in zip(listed.people, faces, strict=True):
        try:
            own = read_identity(entry.face, analyzer, embedding_dim, entry.face_index)
            if face is not None:
                face = dataclasses.replace(face, kps=moved(face.kps), bbox=moved(face.bbox.reshape(2, 2)).ravel())
            picture = draw_keypoints(size, _keypoints(entry, own, face, analyzer, size, canvas.frame), canvas.keypoint_scale)
            people.append(Person(own.embedding, picture, _region(entry, face, size), entry.identitynet_scale, entry.ip_adapter_scale))
        except FaceError as error:
            raise type(error)(error.code, f"person {entry.name}: {error}") from error
        drawn = np.maximum(drawn, picture)
    return people, Image.fromarray(drawn)


def assigned_faces(listed: PeopleFile, found: list[Face]) -> list[Face]:
    """The faces of the group photo, which are from left to right, in the order of the people. Raises `FaceError` for another number."""
    if len(found) != len(listed.people):
        raise FaceError("wrong_number", f"{listed.pose}: {len(found)} faces found for {len(listed.people)} people; show everybody, and nobody else")
    order = listed.pose_names or [person.name for person in listed.people]
    by_name = dict(zip(order, found, strict=True))
    return [by_name[person.name] for person in listed.people]


def keypoints_in_box(pose: Identity, box: np.ndarray, frame: Frame | None = None) -> np.ndarray:
    """A pose's keypoints [5, 2] moved into a box (left, top, right, bottom): its photo fitted into the middle, whole.

    With `frame` it is a square in which the face is where the model has faces.
    """
    if pose.face is None or pose.size is None:
        raise KeypointError("no_keypoints", "the face has no keypoints: give pose with a photo, or keypoints")
    corner, sides = box[:2], box[2:] - box[:2]
    points = pose.face.kps / np.asarray(pose.size, np.float32) if frame is None else frame(pose.face.kps, None)
    shape = np.asarray(pose.size if frame is None else (1, 1), np.float32)
    fitted = shape * (sides / shape).min()
    return (corner + (sides - fitted) / 2 + points * fitted).astype(np.float32)


def _keypoints(
    entry: PersonEntry, own: Identity, face: Face | None, analyzer: Callable[[], FaceAnalyzer], size: tuple[int, int], frame: Frame | None
) -> np.ndarray:
    """Those that are given, of the person's own pose photo, of the group photo, or of the reference: in this order."""
    whole = np.asarray([*size, *size], np.float32)
    if entry.keypoints is not None:
        return entry.keypoints * whole[:2]
    box = whole * (np.asarray([0, 0, 1, 1], np.float32) if entry.box is None else entry.box)
    if entry.pose is not None:
        return keypoints_in_box(read_identity((entry.pose,), analyzer, face_index=entry.pose_face_index), box, frame)
    return keypoints_in_box(own, box, frame) if face is None else face.kps


def _region(entry: PersonEntry, face: Face | None, size: tuple[int, int]) -> Any:
    """The mask or box that is given, else the face box of the group photo."""
    if entry.mask is not None:
        return read_mask(entry.mask, size)
    if entry.box is not None:
        return box_mask(size, entry.box * np.asarray([*size, *size], np.float32), "box")
    assert face is not None, "the file was checked"
    return box_mask(size, face.bbox, "the face in the pose")
