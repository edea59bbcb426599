"""Files that say who is where, and what comes of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from instantid_jax.defaults import framed
from instantid_jax.face import Face, FaceError, Identity
from instantid_jax.group import assigned_faces, keypoints_in_box
from instantid_jax.people_file import PeopleFile, PeopleFileError, PersonEntry, read_people_file

KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])


def read(folder: Path, text: str, name: str = "people.toml") -> PeopleFile:
    (folder / name).write_text(text)
    return read_people_file(folder / name)


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml = '[[person]]\nname = "anna"\nface = ["a.jpg", "b.jpg"]\nbox = [0, 0, 0.5, 1]\nip_adapter_scale = 0.5\n'
    toml += f"[[person]]\nface = 'c.npz'\nmask = 'm.png'\nkeypoints = {(KPS / 64).tolist()}\n"
    points = (KPS / 64).tolist()
    first = {"name": "anna", "face": ["a.jpg", "b.jpg"], "box": [0, 0, 0.5, 1], "ip_adapter_scale": 0.5}
    content = {"person": [first, {"face": "c.npz", "mask": "m.png", "keypoints": points}]}
    for listed in (read(tmp_path, toml), read(tmp_path, json.dumps(content), "people.json")):
        anna, other = listed.people
        assert anna.name == "anna" and anna.face == (tmp_path / "a.jpg", tmp_path / "b.jpg") and anna.ip_adapter_scale == 0.5
        assert anna.box is not None and anna.box.tolist() == [0, 0, 0.5, 1]
        assert other.name == "2" and other.mask == tmp_path / "m.png" and other.keypoints is not None and other.keypoints.shape == (5, 2)
        assert listed.files == [tmp_path / name for name in ("a.jpg", "b.jpg", "c.npz", "m.png")]


def face(left: float) -> Face:
    return Face(np.float32([left, 0, left + 9, 9]), KPS, 0.9, np.ones(4, np.float32))


def test_faces_of_a_group_photo_are_given_by_position_or_by_name() -> None:
    people = tuple(PersonEntry(name, (Path(f"{name}.jpg"),)) for name in ("anna", "ben", "cem"))
    group, faces = PeopleFile(people, Path("group.jpg")), [face(x) for x in (0, 20, 40)]
    assert assigned_faces(group, faces) == faces
    named = dataclasses.replace(group, pose_names=("cem", "anna", "ben"))
    assert assigned_faces(named, faces) == [faces[1], faces[2], faces[0]]
    with pytest.raises(FaceError, match=r"group.jpg: 2 faces found for 3 people; show everybody, and nobody else"):
        assigned_faces(group, faces[:2])


def test_a_pose_is_fitted_into_a_box() -> None:
    pose = Identity(np.ones(4, np.float32), face(0), (64, 64), "scripted")
    box = np.float32([100, 0, 300, 100])  # the photo becomes 100 pixels wide, in the middle
    np.testing.assert_allclose(keypoints_in_box(pose, box), KPS * 100 / 64 + np.float32([150, 0]), atol=1e-4)
    np.testing.assert_allclose(keypoints_in_box(pose, np.float32([64, 0, 128, 64]), framed), framed(KPS) * 64 + np.float32([64, 0]), atol=1e-4)
    with pytest.raises(FaceError, match="the face has no keypoints"):
        keypoints_in_box(Identity(np.ones(4, np.float32), None, None, "precomputed"), box)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[person]", "cannot be read as TOML"),
        ("", r"holds no \[\[person\]\]"),
        ('person = "anna"', r"holds no \[\[person\]\]"),
        ("persons = 1", "the file has an unknown field 'persons'; did you mean 'person'"),
        ('[[person]]\nname = "anna"\nbox = [0, 0, 1, 1]', "person anna: has no face"),
        ('[[person]]\nface = "a.jpg"', "person 1: has no region; give box, mask, or for all people a pose"),
        ('[[person]]\nface = "a.jpg"\nmask = "m.png"', "person 1: nothing says where the keypoints are"),
        ('[[person]]\nface = "a.jpg"\nbox = [1, 0, 0, 1]', "person 1: box .* has no inside"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 64, 64]', "person 1: box is in parts of the picture, 0 to 1"),
        ('[[person]]\nface = "a.jpg"\nbox = [1.2, 0, 1.9, 1]', "person 1: box .* lies outside the picture"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]\n' * 65, "holds 65 people; at most 64 fit in one picture"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1]', "person 1: box must be four numbers"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]\nkeypoints = [[0, 0]]', "person 1: keypoints must be five points"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]\nmask = "m.png"', "person 1: has box and mask; give one of them"),
        ("[[person]]\nface = 3\nbox = [0, 0, 1, 1]", "person 1: face must be a path, not 3"),
        ('[[person]]\nface = "a.jpg"\nboxes = 1', "person 1 has an unknown field 'boxes'; did you mean 'box'"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]\nip_adapter_scale = nan', "ip_adapter_scale must be a finite number, not nan"),
        ('[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]\nface_index = 1.5', "face_index must be a whole number, not 1.5"),
        (
            '[[person]]\nname = "1"\nface = "a"\nbox = [0, 0, 1, 1]\n[[person]]\nname = "1"\nface = "b"\nbox = [0, 0, 1, 1]',
            "two people are called '1'",
        ),
        ('pose_names = ["x"]\n[[person]]\nface = "a.jpg"\nbox = [0, 0, 1, 1]', "pose_names goes with pose, and has every name once: 1"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PeopleFileError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("name", ["people.json", "people.toml"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"x = " + b"[" * 100_000, b"\xff\xfe"])
def test_nested_too_deep_or_no_text(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PeopleFileError, match=rf"{name}: cannot be read as (JSON|TOML)"):
        read_people_file(tmp_path / name)


def test_the_name_says_how_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(PeopleFileError, match=r"people\.yaml: a file of people is \.toml or \.json"):
        read(tmp_path, "person: []", "people.yaml")
