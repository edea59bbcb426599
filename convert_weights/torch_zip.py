"""The zip container of ``torch.save``: entries that lie in the file as they are, found without trusting the directory.

torch stores every entry uncompressed under one folder: ``NAME/data.pkl``, ``NAME/byteorder``, ``NAME/data/0`` and so
on. Anything else that zip can do (compression, encryption, several disks, comments) is refused.
"""

from __future__ import annotations

import dataclasses
import struct

from convert_weights.source import MappedFile, SourceError

MAX_ENTRIES = 100_000
_END, _END64, _LOCATOR, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an entry's bytes lie in the file."""

    name: str
    start: int
    size: int


def read_entries(file: MappedFile) -> dict[str, Entry]:
    """The entries by their names without the common folder. Raises `SourceError` for anything torch would not write."""
    count, size, start = _directory(file)
    directory = file.bytes(start, size)
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        entry, position = _entry(file, directory, position, start)
        if entry.name in entries:
            raise _refused(file, f"the entry {entry.name!r} is there twice")
        entries[entry.name] = entry
    if position != size:
        raise _refused(file, f"the directory has {size - position} bytes more than its entries")
    folders = {name.split("/", 1)[0] for name in entries}
    if len(folders) != 1 or not all("/" in name for name in entries):
        raise _refused(file, "its entries are not in one folder")
    end = 0
    for entry in sorted(entries.values(), key=lambda e: e.start):
        if entry.start < end:
            raise _refused(file, f"the entry {entry.name!r} overlaps another")
        end = entry.start + entry.size
    return {name.split("/", 1)[1]: entry for name, entry in entries.items()}


def _refused(file: MappedFile, reason: str) -> SourceError:
    return SourceError(f"{file.path}: not a sound torch file: {reason}")


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """Number of entries, and length and position of the central directory."""
    if file.size < 22 or file.bytes(file.size - 22, 4) != _END:
        raise _refused(file, "it does not end with a zip directory (is it complete?)")
    disk, first, here, count, size, start, comment = struct.unpack("<4H2LH", file.bytes(file.size - 18, 18))
    end = file.size - 22
    if end >= 20 and file.bytes(end - 20, 4) == _LOCATOR:
        _, position, disks = struct.unpack("<LQL", file.bytes(end - 16, 16))
        end -= 20
        if disks > 1 or position + 56 != end or file.bytes(position, 4) != _END64:
            raise _refused(file, "its zip64 directory is not where it should be")
        length, _, _, disk64, first64, here64, count64, size64, start64 = struct.unpack("<QHHLLQQQQ", file.bytes(position + 4, 52))
        lies = [a for a, b, full in ((count, count64, _FULL16), (size, size64, _FULL32), (start, start64, _FULL32)) if a not in (b, full)]
        if length != 44 or lies:
            raise _refused(file, "its zip64 directory contradicts the plain one")
        disk, first, here, count, size, start, end = disk64, first64, here64, count64, size64, start64, position
    if comment or disk or first or here != count:
        raise _refused(file, "it is split over several disks or has a comment")
    if count > MAX_ENTRIES:
        raise _refused(file, f"it claims {count} entries, more than the {MAX_ENTRIES} that are allowed")
    if start + size != end or size < 46 * count:
        raise _refused(file, "its directory does not lie where it is said to")
    return count, size, start


def _entry(file: MappedFile, directory: bytes, at: int, limit: int) -> tuple[Entry, int]:
    if len(directory) < at + 46 or directory[at : at + 4] != _ENTRY:
        raise _refused(file, "its directory is damaged")
    _, _, flags, method, *_, packed, size, n_name, n_extra, n_comment, disk, _, _, header = struct.unpack("<6H3L5H2L", directory[at + 4 : at + 46])
    after = at + 46 + n_name + n_extra + n_comment
    if len(directory) < after:
        raise _refused(file, "its directory is damaged")
    raw = directory[at + 46 : at + 46 + n_name]
    name = _name(file, raw)
    extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
    size, packed, header = _wide(file, name, extra, size, packed, header)
    if flags & 0x2041:
        raise _refused(file, f"the entry {name!r} is encrypted")
    if method != 0 or packed != size:
        raise _refused(file, f"the entry {name!r} is compressed; torch stores entries as they are")
    if n_comment or disk:
        raise _refused(file, f"the entry {name!r} has a comment or is on another disk")
    local = file.bytes(header, 30)
    length, extra_length = struct.unpack("<HH", local[26:30])
    if local[:4] != _LOCAL or struct.unpack("<H", local[8:10])[0] != 0 or file.bytes(header + 30, length) != raw:
        raise _refused(file, f"the entry {name!r} contradicts the directory")
    start = header + 30 + length + extra_length
    if start + size > limit:
        raise _refused(file, f"the entry {name!r} of {size} bytes reaches beyond the data")
    return Entry(name, start, size), after


def _name(file: MappedFile, raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _refused(file, "the name of an entry is not UTF-8 text") from None
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise _refused(file, f"the entry name {name[:80]!r} leads outside")
    return name


def _wide(file: MappedFile, name: str, extra: bytes, *values: int) -> list[int]:
    """Sizes and position with their 64-bit values from the extra field, where the 32-bit ones say so."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    result = []
    for value in values:
        if value == _FULL32:
            if len(wide) < 8:
                raise _refused(file, f"the entry {name!r} has no 64-bit size where it needs one")
            value, wide = struct.unpack("<Q", wide[:8])[0], wide[8:]
        result.append(value)
    return result
