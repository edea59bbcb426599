"""safetensors headers made to harm: the verdict is the reference library's, on fixed cases and on many random ones."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from convert_weights.readers import open_component
from convert_weights.safetensors_file import MAX_HEADER, _Refused, open_safetensors, parse_header
from convert_weights.source import SourceError

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]}


def header(content: object) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def file_of(content: object, data: bytes = bytes(16)) -> bytes:
    return struct.pack("<Q", len(header(content))) + header(content) + data


def ours(content: bytes) -> bool:
    """Our verdict on a whole file in memory."""
    if len(content) < 8 or (length := int.from_bytes(content[:8], "little")) > MAX_HEADER or 8 + length > len(content):
        return False
    try:
        parse_header(content[8 : 8 + length], len(content) - 8 - length)
    except _Refused:
        return False
    return True


def theirs(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def entry(**changes: object) -> dict[str, object]:
    return {"a": ONE, "b": TWO | changes}


BAD = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header of 100 MB and one": struct.pack("<Q", 100_000_001) + b"{}",
    "not UTF-8": file_of(b'{"\xff":1}', b""),
    "not JSON": file_of(b"{", b""),
    "two values": file_of(b"{}{}", b""),
    "a list": file_of(b"[]", b""),
    "NaN": file_of(b'{"__metadata__":NaN}', b""),
    "a byte order mark": file_of(b"\xef\xbb\xbf{}", b""),
    "half a surrogate pair": file_of(b'{"__metadata__":{"a":"\\ud800"}}', b""),
    "a control character": file_of(b'{"__metadata__":{"a":"\n"}}', b""),
    "deep": file_of(b'{"a":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}", b""),
    "very deep": file_of(b"[" * 500_000, b""),
    "overlap": file_of(entry(data_offsets=[4, 12]), bytes(12)),
    "hole": file_of(entry(data_offsets=[9, 17]), bytes(17)),
    "hole at the start": file_of({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
    "trailing bytes": file_of(entry(), bytes(17)),
    "missing bytes": file_of(entry(), bytes(15)),
    "negative offsets": file_of(entry(data_offsets=[-8, 0])),
    "reversed offsets": file_of(entry(data_offsets=[16, 8])),
    "huge offsets": file_of(entry(data_offsets=[2**63, 2**63 + 8])),
    "offsets beyond 64 bits": file_of(entry(data_offsets=[2**64, 2**64 + 8])),
    "three offsets": file_of(entry(data_offsets=[8, 12, 16])),
    "offsets that are no numbers": file_of(entry(data_offsets=["8", "16"])),
    "fractional offsets": file_of(entry(data_offsets=[8.0, 16.0])),
    "shape that is too small": file_of(entry(shape=[2])),
    "shape that overflows": file_of(entry(shape=[2**32, 2**32])),
    "shape that overflows to the right size": file_of(entry(shape=[2**62, 2**2, 4])),
    "shape that overflows before a zero": file_of({"a": {"dtype": "F32", "shape": [2**63, 2**63, 0], "data_offsets": [0, 0]}}, b""),
    "negative shape": file_of(entry(shape=[-2, -2])),
    "truth as a size": file_of(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"x"),
    "minus zero as a size": file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b""),
    "shape that is no list": file_of(entry(shape=4)),
    "unknown type": file_of(entry(dtype="F17")),
    "type that is no text": file_of(entry(dtype=3)),
    "half a byte": file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
    "no type": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "tensor that is no object": file_of({"a": 3}, b""),
    "metadata that is no object": file_of({"__metadata__": []}, b""),
    "metadata that is no text": file_of({"__metadata__": {"a": 1}}, b""),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}', b""),
    "a field twice": file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
}
# The reference library lets these pass; nobody writes them, and the first is how two readers come to see two files.
STRICTER = {
    "a name twice": file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "a metadata name twice": file_of(b'{"__metadata__":{"a":"b","a":"c"}}', b""),
    "a tensor as a list": file_of(b'{"a":["U8",[1],[0,1]]}', b"x"),
}
GOOD = {
    "two tensors": file_of(entry()),
    "nothing": file_of(b"{}", b""),
    "spaces behind": file_of(header(entry()) + b"   "),
    "a huge size before a zero": file_of({"a": {"dtype": "C64", "shape": [2**63, 0], "data_offsets": [0, 0]}}, b""),
    "spaces before": file_of(b"  " + header(entry())),
    "metadata": file_of({"__metadata__": {"format": "pt"}, **entry()}),
    "no metadata": file_of({"__metadata__": None, **entry()}),
    "empty tensors": file_of({n: {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]} for n in "ab"}, b""),
    "a huge shape of nothing": file_of({"a": {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": [0, 0]}}, b""),
    "a scalar": file_of({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}}, bytes(8)),
    "fields that are unknown": file_of({"a": ONE | {"later": [1, {"x": -2.5}]}}, bytes(8)),
    "names in other scripts": file_of({"ü\U0001f600": ONE}, bytes(8)),
    "any order": file_of({"b": TWO, "a": ONE}),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_by_both(case: str, tmp_path: Path) -> None:
    assert not theirs(BAD[case])
    assert not ours(BAD[case])
    (tmp_path / "x.safetensors").write_bytes(BAD[case])
    with pytest.raises(SourceError, match=r"x\.safetensors: (not a sound safetensors file|the file is empty)"):
        open_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("case", STRICTER)
def test_refused_here_alone(case: str) -> None:
    assert theirs(STRICTER[case])
    assert not ours(STRICTER[case])


@pytest.mark.parametrize("case", GOOD)
def test_accepted_by_both(case: str, tmp_path: Path) -> None:
    assert theirs(GOOD[case])
    assert ours(GOOD[case])
    (tmp_path / "x.safetensors").write_bytes(GOOD[case])
    if case.startswith("a huge"):  # sound by the format's rules, but no array can have it
        with pytest.raises(SourceError, match="which no array can have"):
            open_safetensors(tmp_path / "x.safetensors")
        return
    found = {name: t.array() for name, t in open_safetensors(tmp_path / "x.safetensors").tensors.items()}
    for name, value in deserialize(GOOD[case]):
        assert found[name].tobytes() == bytes(value["data"])


def mutated(rng: np.random.Generator) -> bytes:
    """A sound file with one to three things wrong with it, in the JSON's structure or in its bytes."""
    types = ["F32", "F16", "BF16", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64"]
    sizes = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "I64": 64, "BOOL": 8, "F8_E4M3": 8, "F4": 4, "C64": 64}
    content: dict[str, object] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.3 else {}
    position = 0
    for i in range(rng.integers(0, 4)):
        kind = types[rng.integers(len(types))]
        shape = [int(n) for n in rng.choice([0, 1, 2, 3, 4], rng.integers(0, 3))]
        length = int(np.prod(shape, dtype=int)) * sizes[kind] // 8
        content[f"t{i}"] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + length]}
        position += length
    odd = [0, 1, 2, 8, -1, 2**31, 2**63, 2**64 - 1, 2**64, 1.0, None, True, "1", [], {}, [0], [0, 8], [8, 0], [2**62, 4], "F32", "F99", "\u00e9"]
    tensors = [value for key, value in content.items() if key.startswith("t") and isinstance(value, dict)]
    for _ in range(rng.integers(0, 3)):
        if tensors:
            target = tensors[rng.integers(len(tensors))]
            field = ["dtype", "shape", "data_offsets", "other"][rng.integers(4)]
            value = odd[rng.integers(len(odd))]
            if isinstance(target.get(field), list) and target[field] and rng.random() < 0.6:
                target[field] = list(target[field])
                target[field][rng.integers(len(target[field]))] = value
            elif rng.random() < 0.15:
                target.pop(field, None)
            else:
                target[field] = value
    text = bytearray(json.dumps(content, ensure_ascii=bool(rng.random() < 0.5)).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.integers(len(text))
        match rng.integers(3):
            case 0:
                text[at] ^= 1 << rng.integers(8)
            case 1:
                del text[at]
            case _:
                text.insert(at, rng.choice(list(b'{}[]",:0-9eE. \n\\u\x00\xc3\xa9tfn')))
    length = len(text) + int(rng.choice([0, 0, 0, 0, 0, 1, -1, 8, 2**40]))
    return struct.pack("<Q", max(length, 0)) + bytes(text) + bytes(max(position + int(rng.choice([0, 0, 0, 0, 1, -1])), 0))


def same_verdicts(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    accepted = 0
    for _ in range(count):
        content = mutated(rng)
        verdict = ours(content)
        accepted += verdict
        if verdict != theirs(content):
            assert not verdict and _twice(content), (verdict, content)
    assert count / 20 < accepted < count / 2


def _twice(content: bytes) -> bool:
    length = int.from_bytes(content[:8], "little")
    twice: list[bool] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        twice.append(len(dict(items)) != len(items))
        return dict(items)

    json.loads(content[8 : 8 + length], object_pairs_hook=pairs)
    return any(twice)


def test_the_reference_library_agrees_on_random_files() -> None:
    same_verdicts(4_000, seed=0)


@pytest.mark.slow
def test_the_reference_library_agrees_on_a_hundred_thousand_random_files() -> None:
    same_verdicts(100_000, seed=1)


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("part", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "c:x", "n\0l"])
def test_an_index_that_leads_elsewhere(part: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(GOOD["two tensors"])
    index(folder, {"a": part})
    with pytest.raises(SourceError, match="which is not a file beside it"):
        open_component(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors", "b": "gone.safetensors"}, "'gone.safetensors', which is missing"),
        ({"a": "x.safetensors"}, "holds 'b', which the index does not name"),
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "says that x.safetensors holds 'c', which it does not"),
        ({"a": "x.safetensors", "b": "y.safetensors"}, "holds 'b', which the index places elsewhere"),
        ({}, "has no weight_map"),
        ({"a": 3}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(GOOD["two tensors"])
    (tmp_path / "y.safetensors").write_bytes(file_of(b"{}", b""))
    index(tmp_path, weight_map)
    with pytest.raises(SourceError, match=message):
        open_component(tmp_path)
