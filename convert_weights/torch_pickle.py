"""Files of ``torch.save`` read without torch, and without running anything in them.

A pickle is a program. Here it is interpreted by a machine that knows only what a dictionary of tensors needs: texts,
numbers, tuples, dicts, and a handful of names that stand for fixed, harmless constructions. Every other instruction and
every other name is refused, by name. Nothing is imported and nothing is called by what a file says.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.source import BFLOAT16, MappedFile, SourceError, Tensor, TensorFile
from convert_weights.torch_zip import Entry, read_entries

HEAD = 262
MAX_PICKLE = 64 * 2**20
MAX_TENSORS = 100_000
MAX_DEPTH = 4

_STORAGES: dict[str, np.dtype] = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": BFLOAT16,
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_TENSOR, _PARAMETER, _DICT = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"

_OPCODES = {
    **{b"0": "POP", b"1": "POP_MARK", b"2": "DUP", b"F": "FLOAT", b"I": "INT", b"L": "LONG", b"P": "PERSID", b"S": "STRING", b"T": "BINSTRING"},
    **{b"U": "SHORT_BINSTRING", b"V": "UNICODE", b"g": "GET", b"p": "PUT", b"d": "DICT", b"l": "LIST", b"i": "INST", b"o": "OBJ"},
    **{b"\x81": "NEWOBJ", b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x8b": "LONG4", b"B": "BINBYTES", b"C": "SHORT_BINBYTES"},
    **{b"\x8c": "SHORT_BINUNICODE", b"\x8d": "BINUNICODE8", b"\x8e": "BINBYTES8", b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS", b"\x91": "FROZENSET"},
    **{b"\x92": "NEWOBJ_EX", b"\x93": "STACK_GLOBAL", b"\x94": "MEMOIZE", b"\x95": "FRAME", b"\x96": "BYTEARRAY8", b"\x97": "NEXT_BUFFER"},
    **{b"\x98": "READONLY_BUFFER"},
}


class _Refused(Exception):
    """Why a pickle is refused."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """A permitted name; never looked up anywhere."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage that the pickle speaks of: which entry, how many values of which type."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as a view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: Path) -> TensorFile:
    """The tensors of a ``torch.save`` file; names of nested dicts are joined by dots.

    Raises `SourceError` for damaged files, for any pickle instruction or name beyond those of a tensor dict, and for
    tensors that reach beyond their storage or share memory.
    """
    file = MappedFile(path)
    head = file.bytes(0, min(HEAD, file.size))
    if head[:4] != b"PK\x03\x04":
        raise SourceError(f"{path}: {what_it_is(head) or 'this is neither a safetensors file nor a torch file'}")
    entries = read_entries(file)
    order = entries.get("byteorder")
    if order is not None and file.bytes(order.start, min(order.size, 16)) != b"little":
        raise SourceError(f"{path}: its numbers are not little-endian; save it again on an ordinary machine")
    program = entries.get("data.pkl")
    if program is None or program.size > MAX_PICKLE:
        raise SourceError(f"{path}: not a sound torch file: its data.pkl is missing or longer than {MAX_PICKLE} bytes")
    try:
        content = _Machine(file.bytes(program.start, program.size)).run()
        views = dict(_flatten(content))
        _check_storages(views, entries)
    except _Refused as reason:
        raise SourceError(f"{path}: refused, nothing was run: {reason}") from None
    tensors = {name: _tensor(name, view, file, entries) for name, view in views.items()}
    return TensorFile((file,), tensors)


def what_it_is(head: bytes) -> str | None:
    """What a file is that often lies in the place of weights, from its first `HEAD` bytes; None where it is not known."""
    again = "save it again with torch.save of torch 1.6 or later, or as safetensors"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return f"this is a bare pickle or torch's format before 1.6, which is not read; {again}"
    if head[257:262] == b"ustar":
        return f"this is a tar file, torch's oldest format, which is not read; {again}"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<" or head.startswith(b"version https://"):
        return "this is a web page or a Git LFS pointer instead of weights; download the file again"
    return None


class _Machine:
    """A stack machine for the part of pickle's instructions that a dictionary of tensors needs."""

    def __init__(self, program: bytes):
        self.program, self.at = program, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.actions: dict[bytes, Callable[[], None]] = {
            b"\x80": self._protocol,
            b"c": self._global,
            b"R": self._reduce,
            b"b": self._build,
            b"Q": self._persistent,
            b"(": lambda: self.marks.append(len(self.stack)),
            b"q": lambda: self._put(self._number("<B")),
            b"r": lambda: self._put(self._number("<I")),
            b"h": lambda: self._get(self._number("<B")),
            b"j": lambda: self._get(self._number("<I")),
            b"s": lambda: self._fill([(self._pop(), self._pop())[::-1]]),
            b"u": lambda: self._fill(self._pairs(self._items())),
            b"a": lambda: self._append([self._pop()]),
            b"e": lambda: self._append(self._items()),
            b"t": lambda: self.stack.append(tuple(self._items())),
            b"}": lambda: self.stack.append({}),
            b"]": lambda: self.stack.append([]),
            b")": lambda: self.stack.append(()),
            b"\x85": lambda: self._tuple(1),
            b"\x86": lambda: self._tuple(2),
            b"\x87": lambda: self._tuple(3),
            b"N": lambda: self.stack.append(None),
            b"\x88": lambda: self.stack.append(True),
            b"\x89": lambda: self.stack.append(False),
            b"K": lambda: self.stack.append(self._number("<B")),
            b"M": lambda: self.stack.append(self._number("<H")),
            b"J": lambda: self.stack.append(self._number("<i")),
            b"G": lambda: self.stack.append(self._number(">d")),
            b"\x8a": lambda: self.stack.append(int.from_bytes(self._read(self._short()), "little", signed=True)),
            b"X": lambda: self.stack.append(self._text(self._number("<I"))),
        }

    def run(self) -> Any:
        """The object that the program makes."""
        if self.program[:2] != b"\x80\x02":
            raise _Refused("the pickle is not of protocol 2, which torch writes")
        while True:
            code = self._read(1)
            if code == b".":
                break
            action = self.actions.get(code)
            if action is None:
                known = _OPCODES.get(code)
                raise _Refused(f"the pickle instruction {known} is not allowed" if known else f"byte {code!r} is no pickle instruction")
            action()
        if self.at != len(self.program):
            raise _Refused(f"{len(self.program) - self.at} bytes follow the end of the pickle")
        if len(self.stack) != 1 or self.marks:
            raise _Refused("the pickle does not end with one object")
        return self.stack[0]

    def _read(self, length: int) -> bytes:
        if self.at + length > len(self.program):
            raise _Refused("the pickle is cut off")
        self.at += length
        return self.program[self.at - length : self.at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def _short(self) -> int:
        length = self._number("<B")
        if length > 8:
            raise _Refused(f"an integer of {length} bytes is too long")
        return length

    def _text(self, length: int) -> str:
        try:
            return self._read(length).decode()
        except UnicodeDecodeError:
            raise _Refused("a text is not UTF-8") from None

    def _line(self) -> str:
        end = self.program.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise _Refused("a name is cut off or too long")
        text = self._text(end - self.at)
        self.at += 1
        return text

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("the pickle takes more than it has put down")
        return self.stack.pop()

    def _top(self) -> Any:
        self.stack.append(self._pop())
        return self.stack[-1]

    def _items(self) -> list[Any]:
        if not self.marks:
            raise _Refused("the pickle takes more than it has put down")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _tuple(self, length: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def _put(self, index: int) -> None:
        self.memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise _Refused("the pickle refers to something that it has not made")
        self.stack.append(self.memo[index])

    @staticmethod
    def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
        if len(items) % 2:
            raise _Refused("a dict has a key without a value")
        return list(zip(items[::2], items[1::2], strict=True))

    def _fill(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._top()
        if type(target) is not dict:
            raise _Refused("items are set on something that is not a dict")
        for key, value in pairs:
            if not isinstance(key, str | int):
                raise _Refused(f"a dict key is a {type(key).__name__}")
            if key in target:
                raise _Refused(f"the name {str(key)[:80]!r} is given twice")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise _Refused("items are appended to something that is not a list")
        target.extend(items)

    def _protocol(self) -> None:
        self._number("<B")
        if self.at != 2:
            raise _Refused("the pickle instruction PROTO is not at its start")

    def _global(self) -> None:
        name = f"{self._line()} {self._line()}"
        if name not in _STORAGES and name not in (_TENSOR, _PARAMETER, _DICT):
            raise _Refused(f"the pickle asks for {name.replace(' ', '.')!r}, which a dictionary of tensors does not need")
        self.stack.append(_Global(name))

    def _persistent(self) -> None:
        match self._pop():
            case ("storage", _Global(name), str(key), str(), int(count)) if name in _STORAGES and count >= 0:
                self.stack.append(_Storage(key, _STORAGES[name], count))
            case _:
                raise _Refused("a persistent id is not a tensor storage")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case _Global(name), () if name == _DICT:
                self.stack.append({})
            case _Global(name), (_View() as view, bool(), dict()) if name == _PARAMETER:
                self.stack.append(view)
            case _Global(name), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest) if name == _TENSOR:
                if rest not in ([], [None], [{}]):
                    raise _Refused("a tensor has metadata that is not understood")
                self.stack.append(_view(storage, offset, shape, strides))
            case _:
                raise _Refused("a call is not one that makes a tensor or a dict")

    def _build(self) -> None:
        """`OrderedDict.__setstate__`, which torch uses for version numbers: taken off and forgotten."""
        state = self._pop()
        if not isinstance(state, dict) or set(state) - {"_metadata"} or type(self._top()) is not dict:
            raise _Refused("attributes are set on an object (BUILD)")


def _view(storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> _View:
    """A view that stays inside its storage and uses no element twice."""
    if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides)):
        raise _Refused("a tensor's size, stride or offset is negative or no number")
    if len(shape) != len(strides) or len(shape) > 8:
        raise _Refused(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    count = math.prod(shape)
    if count > storage.count:
        raise _Refused(f"a tensor of shape {shape} has more values than its storage of {storage.count}")
    if count and offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) > storage.count:
        raise _Refused(f"a tensor of shape {shape} at offset {offset} reaches beyond its storage of {storage.count} values")
    extent = 1
    for n, s in sorted(zip(shape, strides, strict=True), key=lambda axis: axis[1]):
        if n > 1 and s < extent and count:
            raise _Refused(f"a tensor of shape {shape} and strides {strides} uses values more than once")
        extent = max(extent, (n - 1) * s + extent)
    return _View(storage, offset, shape, strides)


def _flatten(content: Any) -> Iterator[tuple[str, _View]]:
    """Tensors by their dotted names. Anything else but plain numbers and texts, as training tools add, is refused."""
    if type(content) is not dict:
        raise _Refused("the file is not a dict of tensors")
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    count = 0
    while pending:
        name, value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_TENSORS:
            raise _Refused(f"it is nested more than {MAX_DEPTH} deep or has more than {MAX_TENSORS} entries")
        if isinstance(value, _View):
            yield name, value
        elif type(value) is dict:
            pending += [(f"{name}.{key}" if name else str(key), inner, depth + 1) for key, inner in reversed(value.items())]
        elif not (value is None or isinstance(value, str | int | float)):
            raise _Refused(f"{name!r} is not a tensor or a dict of tensors")


def _check_storages(views: dict[str, _View], entries: dict[str, Entry]) -> None:
    """Storages as large as they say and the same to everyone; no two tensors on the same values."""
    storages: dict[str, _Storage] = {}
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, view in views.items():
        storage = view.storage
        if storages.setdefault(storage.key, storage) != storage:
            raise _Refused(f"storage {storage.key!r} is used with different types or sizes")
        entry = entries.get(f"data/{storage.key}")
        if entry is None or entry.size != storage.count * storage.dtype.itemsize:
            found = "missing" if entry is None else f"{entry.size} bytes long"
            raise _Refused(f"storage {storage.key!r} of {storage.count} x {storage.dtype} is {found}")
        if math.prod(view.shape):
            last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
            spans.setdefault(storage.key, []).append((view.offset, last, name))
    for span in spans.values():
        span.sort()
        for (_, last, one), (first, _, other) in itertools.pairwise(span):
            if first <= last:
                raise _Refused(f"the tensors {one!r} and {other!r} share memory")


def _tensor(name: str, view: _View, file: MappedFile, entries: dict[str, Entry]) -> Tensor:
    dense = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    contiguous = all(n == 1 or s == d for n, s, d in zip(view.shape, view.strides, dense, strict=True))
    dtype = view.storage.dtype
    start = entries[f"data/{view.storage.key}"].start + view.offset * dtype.itemsize
    return Tensor(name, file, dtype, view.shape, start, None if contiguous else view.strides)
