"""Torch files made to harm: nothing in them runs, every one is refused with a reason, and in constant memory."""

import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from convert_weights.__main__ import main
from convert_weights.source import SourceError
from convert_weights.torch_pickle import open_torch

DATA = np.arange(6, dtype=np.float32).tobytes()
ROOT = Path(__file__).parents[2]


class Runs:
    """An object whose unpickling calls something."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(key: str = "0", kind: str = "FloatStorage", count: int = 6) -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(shape: tuple[int, ...] = (2, 3), strides: tuple[int, ...] = (3, 1), offset: int = 0, of: bytes | None = None) -> bytes:
    hooks = b"\x89" + name("collections", "OrderedDict") + b")R"
    arguments = (of or storage()) + integer(offset) + numbers(*shape) + numbers(*strides) + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def program(*items: bytes) -> bytes:
    """A dict of a name for every item."""
    return b"\x80\x02}(" + b"".join(text(f"t{i}") + item for i, item in enumerate(items)) + b"u."


def archive(pickled: bytes, data: bytes = DATA, extra: dict[str, bytes] | None = None, folder: str = "archive") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for key, value in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", "data/0": data, **(extra or {})}.items():
            file.writestr(zipfile.ZipInfo(f"{folder}/{key}", (1980, 1, 1, 0, 0, 0)), value)
    return out.getvalue()


def read(content: bytes, folder: Path) -> dict[str, np.ndarray]:
    path = folder / "x.bin"
    path.write_bytes(content)
    return {name: t.array() for name, t in open_torch(path).tensors.items()}


def torch_bytes(value: object, **options: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)  # type: ignore[arg-type]
    return out.getvalue()


def test_the_builders_make_what_both_readers_read(tmp_path: Path) -> None:
    content = archive(program(tensor()))
    assert np.array_equal(read(content, tmp_path)["t0"], np.arange(6).reshape(2, 3))
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True)["t0"], torch.arange(6.0).view(2, 3))


REDUCE = {
    "os.system": Runs(os.system, "touch pwned"),
    "eval": Runs(eval, "open('pwned', 'w')"),
    "exec": Runs(exec, "open('pwned', 'w')"),
    "open": Runs(open, "pwned", "w"),
    "import": Runs(__import__, "antigravity"),
    "popen": Runs(subprocess.Popen, ["touch", "pwned"]),
    "getattr": Runs(getattr, OrderedDict, "clear"),
    "pickle in pickle": Runs(pickle.loads, pickle.dumps(Runs(os.system, "touch pwned"))),
    "numpy": np.ones(3),
    "an array of objects": np.array([Runs(os.system, "touch pwned")], dtype=object),
}

OPCODES = {
    "REDUCE": name("os", "system") + b"(" + text("touch pwned") + b"tR",
    "INST": b"(" + text("touch pwned") + b"ios\nsystem\n",
    "OBJ": b"(" + name("os", "system") + text("touch pwned") + b"o",
    "NEWOBJ": name("os", "system") + b")\x81",
    "NEWOBJ_EX": name("collections", "OrderedDict") + b")}\x92",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93",
    "BUILD": name("collections", "OrderedDict") + b")R}" + text("__class__") + b"Nsb",
    "BUILD of a tensor": tensor() + b"}b",
    "BUILD of a tuple": name("collections", "OrderedDict") + b")R)N\x86b",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n",
    "BINPERSID of a text": text("storage") + b"Q",
    "BINPERSID of a foreign kind": b"(" + text("module") + name("torch", "FloatStorage") + text("0") + text("cpu") + integer(6) + b"tQ",
    "BINPERSID with a name for a key": b"(" + text("storage") + name("torch", "FloatStorage") + b")" + text("cpu") + integer(6) + b"tQ",
    "a negative storage": storage(count=-1),
    "GLOBAL alone": name("os", "system"),
    "GLOBAL of a permitted module": name("torch", "load"),
    "GLOBAL with a dotted name": name("torch", "FloatStorage.__init__"),
    "GLOBAL that never ends": b"c" + b"x" * 300,
    "a permitted name called wrongly": name("torch", "FloatStorage") + b")R",
    "a dict called": b"})R",
    "OrderedDict with arguments": name("collections", "OrderedDict") + b"]\x85R",
    "a tensor of no storage": name("torch._utils", "_rebuild_tensor_v2") + b"(N" + integer(0) + b"))\x89}tR",
    "a tensor with metadata": name("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + storage()
    + integer(0)
    + numbers(6)
    + numbers(1)
    + b"\x89}"
    + text("x")
    + b"tR",
    "a parameter of a dict": name("torch._utils", "_rebuild_parameter") + b"(}\x88}tR",
    "a text of two gigabytes": b"X" + struct.pack("<I", 2**31) + b"x",
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**62),
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**62),
    "LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "LONG1 of 255 bytes": b"\x8a\xff" + b"\x01" * 255,
    "FRAME": b"\x95" + struct.pack("<Q", 2**62),
    "bytes that are no text": b"X\x02\x00\x00\x00\xff\xfe",
    "a memo that was never made": b"h\x07",
    "POP": b"0",
    "DUP": b"2",
    "no opcode": b"\xfe",
    "an empty stack": b"t",
    "protocol in the middle": b"\x80\x02N",
    "a list": b"]",
    "a set of items on a tuple": b")" + text("a") + b"Ns",
    "a key that is a dict": b"}}Ns",
    "an append to a dict": b"}Na",
}


def deep(levels: int) -> bytes:
    return b"}" + (text("d") + b"}") * levels + b"s" * levels


def laughs() -> bytes:
    """Ten dicts of a thousand names, each the one before: 10^30 tensors if they were spelt out."""
    out = b"}q\x00"
    for level in range(10):
        out += b"}(" + b"".join(text(str(i)) + bytes([0x68, level]) for i in range(1000)) + b"u" + bytes([0x71, level + 1])
    return out


PROGRAMS = {
    "two ends": program(tensor()) + b".",
    "a second pickle behind": program(tensor()) + program(OPCODES["REDUCE"]),
    "no end": program(tensor())[:-1],
    "nothing": b"",
    "only an end": b"\x80\x02.",
    "an open mark": b"\x80\x02(}.",
    "two objects": b"\x80\x02}}.",
    "a tensor alone": b"\x80\x02" + tensor() + b".",
    "a number alone": b"\x80\x02K\x01.",
    "protocol 0": b"(dp0\n.",
    "protocol 4": pickle.dumps({"a": 1}, protocol=4),
    "no protocol": b"}.",
    "a name twice": b"\x80\x02}(" + text("a") + tensor() + text("a") + tensor() + b"u.",
    "five dicts deep": program(deep(5)),
    "a hundred thousand dicts deep": program(deep(100_000)),
    "a dict in itself": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
    "a billion laughs": b"\x80\x02}" + text("l") + laughs() + b"s.",
    "an odd number of items": b"\x80\x02}(" + text("a") + b"u.",
}

STORAGES = {
    "more values than the storage": tensor((7,), (1,)),
    "a size of 10^12": tensor((10**6, 10**6), (10**6, 1)),
    "a storage of 10^12": tensor((10**12,), (1,), of=storage(count=10**12)),
    "sizes whose product overflows": tensor((2**40, 2**40), (0, 0)),
    "a huge size of nothing": tensor((0, 2**60), (1, 1)),
    "beyond the storage by offset": tensor((6,), (1,), 1),
    "beyond the storage by stride": tensor((2, 3), (4, 1)),
    "a negative offset": tensor(offset=-1),
    "a negative stride": tensor((2, 3), (-3, 1)),
    "a negative size": tensor((-2, 3), (3, 1)),
    "a size that is no number": tensor().replace(numbers(2, 3), b"(" + text("2") + integer(3) + b"t"),
    "a stride of zero": tensor((2, 3), (0, 1)),
    "strides that meet": tensor((2, 3), (1, 1)),
    "more strides than sizes": tensor((2, 3), (3, 1, 1)),
    "half the type": tensor(of=storage(kind="HalfStorage")),
    "twice the type": tensor((3,), (1,), of=storage(kind="DoubleStorage", count=6)),
    "a type that is not stored": tensor(of=storage(kind="QInt8Storage")),
    "a missing storage": tensor(of=storage(key="1")),
    "a storage outside": tensor(of=storage(key="../../etc/passwd")),
}


def hostile() -> dict[str, bytes]:
    """Every file here must be refused."""
    files = {f"call {key}": archive(pickle.dumps({"a": value}, protocol=2)) for key, value in REDUCE.items()}
    files |= {f"call {key} alone": archive(pickle.dumps(value, protocol=2)) for key, value in REDUCE.items()}
    files |= {f"opcode {key}": archive(program(value)) for key, value in OPCODES.items() if key != "a list"}
    files |= {f"program {key}": archive(value) for key, value in PROGRAMS.items()}
    files |= {f"storage {key}": archive(program(value)) for key, value in STORAGES.items()}
    files["storage twice"] = archive(program(tensor(), tensor()))
    files["storage overlapping"] = archive(program(tensor((4,), (1,)), tensor((3,), (1,), 3)))
    files["storage in two types"] = archive(program(tensor((3,), (1,)), tensor((3,), (1,), 3, of=storage(kind="IntStorage"))))
    files["a list"] = archive(program(OPCODES["a list"]))
    files["a list of tensors"] = archive(program(b"](" + tensor() + b"e"))
    files |= containers()
    return files


def containers() -> dict[str, bytes]:
    good, length = archive(program(tensor())), len(archive(program(tensor())))
    files = {
        "legacy torch": torch_bytes({"a": torch.ones(3)}, _use_new_zipfile_serialization=False),
        "bare pickle": pickle.dumps({"a": 1}),
        "web page": b"<!DOCTYPE html><html>404</html>",
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "one byte": b"P",
        "torchscript": archive(program(tensor()), extra={"data.pkl.extra": b"", "../code": b"x"}),
        "slip": archive(program(tensor()), extra={"../../x": b"x"}),
        "slip within": archive(program(tensor()), extra={"a/../b": b"x"}),
        "absolute": archive(program(tensor()), folder="/archive"),
        "backslash": archive(program(tensor()), extra={"a\\b": b"x"}),
        "two folders": archive(program(tensor())) and zipped([("a/data.pkl", program(tensor())), ("b/data/0", DATA)]),
        "no folder": zipped([("data.pkl", program(tensor())), ("data/0", DATA)]),
        "no pickle": zipped([("a/data/0", DATA)]),
        "no entries": zipped([]),
        "big endian": zipped([("a/data.pkl", program(tensor())), ("a/byteorder", b"big"), ("a/data/0", DATA)]),
        "a long pickle": archive(b"\x80\x02" + b"N" * (65 * 2**20) + b"."),
        "deflated": zipped([("a/data.pkl", program(tensor())), ("a/data/0", b"\0" * 2**20)], zipfile.ZIP_DEFLATED),
        "bzip": zipped([("a/data.pkl", program(tensor())), ("a/data/0", DATA)], zipfile.ZIP_BZIP2),
        "a comment": good[:-2] + b"\x05\x00hello",
        "bytes behind": good + b"\0" * 64,
        "bytes before": b"#!/bin/sh\n" + good,
        "cut off": good[:-30],
        "cut in half": good[: length // 2],
        "only the start": good[:60],
        "a million entries": zipped([(f"a/{i}", b"") for i in range(100_001)]),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO(b""))
    files["tar"] = buffer.getvalue()
    with pytest.warns(UserWarning, match="Duplicate name"):
        files["a name twice"] = zipped([("a/data.pkl", program(tensor())), ("a/data/0", DATA), ("a/data/0", DATA)])
    return files | lies(good)


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for key, value in entries:
            file.writestr(key, value, method)
    return out.getvalue()


def lies(good: bytes) -> dict[str, bytes]:
    """A directory that says other things than the file."""
    start = good.rindex(b"PK\x01\x02")  # the last entry of the directory: data/0
    end = len(good) - 22

    def changed(at: int, form: str, value: int) -> bytes:
        out = bytearray(good)
        struct.pack_into(form, out, at, value)
        return bytes(out)

    files = {
        "lie: encrypted": changed(start + 8, "<H", 1),
        "lie: strongly encrypted": changed(start + 8, "<H", 0x41),
        "lie: method": changed(start + 10, "<H", 8),
        "lie: packed size": changed(start + 20, "<I", 12),
        "lie: size": changed(start + 24, "<I", 2**31),
        "lie: both sizes": changed(start + 20, "<I", 2**31)[: start + 24] + struct.pack("<I", 2**31) + good[start + 28 :],
        "lie: 64-bit size without one": changed(start + 24, "<I", 2**32 - 1),
        "lie: header": changed(start + 42, "<I", 3),
        "lie: header outside": changed(start + 42, "<I", 2**31),
        "lie: header of another entry": changed(start + 42, "<I", 0),
        "lie: disk": changed(start + 34, "<H", 1),
        "lie: a name that is longer": changed(start + 28, "<H", 60_000),
        "lie: an extra that is longer": changed(start + 30, "<H", 60_000),
        "lie: fewer entries": changed(end + 10, "<H", 2)[: end + 8] + b"\x02\x00\x02\x00" + good[end + 12 :],
        "lie: more entries": good[: end + 8] + b"\xff\xff\xff\xff" + good[end + 12 :],
        "lie: directory size": changed(end + 12, "<I", 2**31),
        "lie: directory start": changed(end + 16, "<I", 0),
    }
    size, first = struct.unpack("<II", good[end + 12 : end + 20])
    for what, count, where in (("entries", 2**60, first), ("start", 3, 2**62)):
        record = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, where)
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
        plain = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        files[f"lie: zip64 {what}"] = good[:end] + record + locator + plain
        files[f"lie: zip64 {what} against the plain one"] = good[:end] + record + locator + good[end:]
        files[f"lie: zip64 {what} elsewhere"] = good[:end] + record + locator[:8] + struct.pack("<QL", 2**60, 1) + plain
    return files


WATCHER = """
import json, os, pickle, sys
from pathlib import Path
from convert_weights.readers import open_tensors
from convert_weights.__main__ import main
from convert_weights.source import SourceError

folder = Path(sys.argv[1])
files = sorted(folder.glob("*.bin"))
open_tensors(folder / "good.bin")  # whatever is imported late is imported now
seen, watching = [], False

def hook(event, arguments):
    if watching:
        own = event == "open" and Path(os.fsdecode(arguments[0])).parent == folder and "w" not in str(arguments[1])
        if not own and event not in ("mmap.__new__", "os.stat"):
            seen.append([event, repr(arguments)[:200]])

sys.addaudithook(hook)
verdicts = {}
for path in files:
    watching = True
    try:
        open_tensors(path)
        verdict = "accepted"
    except SourceError as problem:
        verdict = str(problem)
    watching = False
    verdicts[path.name] = verdict
refused = list(seen)
watching = True
pickle.loads(b"cos\\ngetpid\\n.")  # what the watcher would see of a file that is run
watching = False
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # KiB, since exec
modules = [m for m in ("antigravity", "torch") if m in sys.modules]
print(json.dumps({"verdicts": verdicts, "seen": refused, "control": seen, "peak": peak, "modules": modules}))
"""


def test_nothing_runs_and_everything_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "good.bin").write_bytes(archive(program(tensor())))
    files = hostile()
    for i, content in enumerate(files.values()):
        (folder / f"{i:04}.bin").write_bytes(content)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WATCHER, str(folder)], capture_output=True, text=True, cwd=work, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["seen"] == []
    assert ["pickle.find_class", "('os', 'getpid')"] in found["control"]
    assert found["modules"] == []
    assert list(work.iterdir()) == []
    verdicts = {key: found["verdicts"][f"{i:04}.bin"] for i, key in enumerate(files)}
    assert [key for key, verdict in verdicts.items() if verdict == "accepted"] == []
    assert found["verdicts"]["good.bin"] == "accepted"
    assert len(verdicts) > 150
    assert found["peak"] < 1.5 * 2**20  # KiB, of which the imports take a third
    for key in (k for k in verdicts if k.startswith(("call", "opcode"))):
        assert "nothing was run" in verdicts[key], (key, verdicts[key])
    assert "'os.system'" in verdicts["opcode REDUCE"].replace("posix", "os")
    assert "instruction INST is not allowed" in verdicts["opcode INST"]
    assert "instruction STACK_GLOBAL is not allowed" in verdicts["opcode STACK_GLOBAL"] or "SHORT_BINUNICODE" in verdicts["opcode STACK_GLOBAL"]
    assert "format before 1.6" in verdicts["legacy torch"]
    assert "tar file" in verdicts["tar"]
    assert "Git LFS" in verdicts["git lfs"] and "web page" in verdicts["web page"]


def test_import_of_a_hostile_adapter_is_refused(golden_snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "instantid"
    source.mkdir()
    (source / "ControlNetModel").symlink_to(golden_snapshot / "instantid/ControlNetModel")
    mark = tmp_path / "pwned"
    (source / "ip-adapter.bin").write_bytes(archive(pickle.dumps({"image_proj": Runs(os.system, f"touch {mark}")}, protocol=2)))
    command = ["import", "--base", str(golden_snapshot / "base"), "--instantid", str(source), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "refused, nothing was run: the pickle asks for 'posix.system', which a dictionary of tensors does not need" in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instantid"]


def test_every_pickle_opcode_is_allowed_or_named() -> None:
    from convert_weights.torch_pickle import _OPCODES, _Machine

    known = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}
    allowed = set(_Machine(b"").actions) | {b"."}
    assert allowed | set(_OPCODES) == set(known)
    assert allowed.isdisjoint(_OPCODES)
    assert all(known[code] == value for code, value in _OPCODES.items())


def test_every_truncation_and_most_bit_flips_are_noticed(tmp_path: Path) -> None:
    """Cut anywhere: refused. One bit changed outside the tensors: refused, or still tensors inside their storages."""
    good = archive(program(tensor()))
    for cut in range(0, len(good), 5):
        with pytest.raises(SourceError):
            read(good[:cut], tmp_path)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good) * 8, 500):
        changed = bytearray(good)
        changed[position // 8] ^= 1 << (position % 8)
        try:
            tensors = read(bytes(changed), tmp_path)
        except SourceError:
            continue
        assert all(x.nbytes <= len(DATA) for x in tensors.values())


def test_a_file_that_changes_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for change in (lambda: os.truncate(path, 100), lambda: path.write_bytes(archive(program(tensor()), DATA[::-1])), path.unlink):
        path.write_bytes(archive(program(tensor())))
        os.utime(path, ns=(1, 1))
        file = open_torch(path)
        assert file.tensors["t0"].array()[1, 2] == 5
        change()
        with pytest.raises(SourceError, match="the file changed while it was read"):
            file.tensors["t0"].array()
