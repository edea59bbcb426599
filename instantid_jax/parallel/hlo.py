"""What a compiled program does, read from its text (`compiled.as_text()`): loops counted as often as they run.

XLA's own cost analysis takes the body of a loop once, and its FLOPs and bytes leave out how often. Here every computation has
a number of calls: 1 for the entry, times the trip count through a `while`; of a condition's branches the dearest counts. Only
what a TPU's text holds is read: convolutions and dots (on TPU every matrix product is a convolution), collectives, the
compiler's `"estimated_cycles"` of each operation, and custom calls, whose inside (Pallas kernels) the compiler cannot see.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Costs", "HloError", "Program", "costs", "parse", "taps"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64}
_BITS |= {"s2": 2, "u2": 2, "s64": 64, "u64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)")


class HloError(ValueError):
    """A compiled program's text that cannot be read."""


class Array(NamedTuple):
    """Type and shape of a value, and whether it lies in HBM (not in the chip's scratch memory)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def nbytes(self) -> int:
        """Bytes without a layout's padding."""
        bits = 8 if self.dtype.startswith("f8") else _BITS.get(self.dtype)
        if bits is None:
            raise ValueError(f"the compiled program has elements of a type whose size is not known here: {self.dtype}")
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    """The result's arrays; several where it is a tuple."""
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """The line behind the opcode: arguments, then attributes."""

    def attribute(self, pattern: str) -> str | None:
        """First group of the pattern in the attributes."""
        found = re.search(pattern, self.rest)
        return None if found is None else found.group(1)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        return tuple(name for names in _CALLED.findall(self.rest) for name in re.findall(r"%([\w.\-]+)", names))


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    roots: dict[str, str]
    entry: str


class Costs(NamedTuple):
    """Work of one device."""

    flops: float
    """Of matrix products and convolutions, without custom calls; zeros that pad a convolution cost nothing."""
    hbm_bytes: float
    """Read and written by the operations, where operands lie in HBM."""
    cycles: float
    """Sum of the compiler's estimates."""
    uncounted: dict[str, float]
    """Calls of custom calls, by target: the compiler estimates no cycles for them."""
    collectives: dict[str, float]
    """Bytes by kind: of the result of a gather, of what a reduction is given, of what is sent otherwise; `send` is what goes to other slices."""
    crossing: float
    """The part of the collectives' bytes that goes between slices: of groups with devices of several, and of sends."""


def parse(text: str) -> Program:
    """Reads the text of a compiled module."""
    computations: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry, name, current = "", "", None
    for line in _lines(text):
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
            name = line.removeprefix("ENTRY").split("(")[0].strip().lstrip("%")
            current = computations[name] = {}
            entry = name if is_entry else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
            if line.lstrip().startswith("ROOT"):
                roots[name] = instruction.name
    if not entry:
        raise HloError("the text has no ENTRY computation: it is no compiled HLO module")
    return Program(computations, roots, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines of the text; what a kernel's metadata breaks over several is put together again."""
    held = ""
    for line in text.splitlines():
        begins = line.startswith((" ", "%", "ENTRY", "HloModule")) or line in ("", "}")
        if begins and held:
            yield held
            held = ""
        held = line if begins else held + line
    yield held


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise HloError(f"unbalanced brackets in {text[:80]!r}")


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opening:closing]))
    return Instruction(name.lstrip("%"), _arrays(kind), rest[:opening], operands, rest[opening:])


def _arrays(kind: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), not re.search(r"S\([1-9]\)", layout or ""))
        for dtype, shape, layout in _ARRAY.findall(kind)
    )


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """How often a `while` runs: what the compiler says, else the bound of its counter. Raises HloError where neither is known."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known is not None:
        return int(known)
    name = loop.attribute(r"condition=%([\w.\-]+)") or ""
    condition = program.computations[name]
    compare = condition[program.roots[name]]
    names = compare.operands
    if compare.opcode == "fusion":  # the comparison alone, wrapped
        wrapper, inner = compare, program.computations[compare.called[0]]
        compare = inner[program.roots[wrapper.called[0]]]
        outer = {p.name: wrapper.operands[int(p.rest[1 : p.rest.index(")")])] for p in inner.values() if p.opcode == "parameter"}
        condition = condition | inner
        names = tuple(outer.get(n, n) for n in compare.operands)
    left, right = (_constant(condition, n, loop, computation) for n in names)
    direction = compare.attribute(r"direction=(\w+)")
    if direction in ("GT", "GE"):  # counts down from the left
        left, right = right, left
    if direction in ("LT", "GT", "LE", "GE", "NE") and right is not None:
        distance = right - (left or 0) + (direction in ("LE", "GE"))
        return max(-(-distance // _step(program, condition, names, loop)), 0)
    raise HloError(f"the trip count of {loop.name} is not known")


def _step(program: Program, condition: Computation, compared: Sequence[str], loop: Instruction) -> int:
    """By how much the counter among what a loop's condition compares moves in a turn; 1 where the body does not plainly say."""
    name = loop.attribute(r"body=%([\w.\-]+)") or ""
    body = program.computations[name]
    results = body[program.roots[name]].operands
    for counter in filter(None, map(condition.get, compared)):
        if counter.opcode != "get-tuple-element":
            continue
        change = body.get(results[int(counter.attribute(r"index=(\d+)") or 0)])
        if change is None or change.opcode not in ("add", "subtract"):
            continue
        for operand in (body[o] for o in change.operands):
            if operand.opcode == "constant" and (value := re.match(r"\((-?[1-9]\d*)\)", operand.rest)):
                return abs(int(value.group(1)))
    return 1


def _constant(scope: Computation, name: str, loop: Instruction, outside: Computation) -> int | None:
    """The value of a scalar of a loop's condition that is constant, or that the loop's initial tuple sets to a constant."""
    found = scope.get(name)
    while found is not None:
        if found.opcode == "constant":
            value = re.match(r"\((-?\d+)\)", found.rest)
            return int(value.group(1)) if value else None
        if found.opcode == "get-tuple-element" and scope is not outside:
            initial = outside[loop.operands[0]]
            if initial.opcode != "tuple":
                return None
            scope, found = outside, outside[initial.operands[int(found.attribute(r"index=(\d+)") or 0)]]
        elif found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            found = scope.get(found.operands[0])
        else:
            return None
    return None


# Operations that call a computation for every element, to combine two.
_COMBINING = ("reduce", "reduce-window", "scatter", "sort", "map", "all-reduce", "reduce-scatter", "select-and-scatter")


def calls(program: Program, root: str | None = None) -> tuple[dict[str, float], set[str]]:
    """How often each computation runs from `root` (the entry), and which of them run within a fusion. Of a condition the dearest branch does."""
    number: dict[str, float] = collections.defaultdict(float)
    fused: set[str] = set()

    def visit(name: str, times: float, inside: bool) -> None:
        number[name] += times
        if inside:
            fused.add(name)
        computation = program.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                body = instruction.attribute(r"body=%([\w.\-]+)") or ""
                visit(body, times * trip_count(program, computation, instruction), inside)
            elif instruction.opcode == "conditional":
                visit(max(instruction.called, key=lambda branch: _work(program, branch)), times, inside)
            elif instruction.opcode not in _COMBINING and not instruction.opcode.endswith(("-update", "-done")):  # what -start names they name too
                for called in instruction.called:
                    if called in program.computations:
                        visit(called, times, inside or instruction.opcode == "fusion")

    visit(program.entry if root is None else root, 1.0, False)
    return dict(number), fused


def _work(program: Program, root: str) -> tuple[float, float]:
    """FLOPs and cycles of a computation and all that it calls, by which branches are compared."""
    number, fused = calls(program, root)
    flops = cycles = 0.0
    for name, times in number.items():
        computation = program.computations[name]
        for instruction in computation.values():
            flops += times * _flops(computation, instruction)
            cycles += 0.0 if name in fused else times * _cycles(instruction)
    return flops, cycles


def _flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "convolution":
        return convolution_flops(computation, instruction)
    return _dot_flops(computation, instruction) if instruction.opcode == "dot" else 0.0


def _cycles(instruction: Instruction) -> float:
    return float(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)


def costs(program: Program, slice_size: int | None = None) -> Costs:
    """Adds up the work of one device. `slice_size` is the number of devices of a slice, where there are several."""
    number, fused = calls(program)
    flops = moved = cycles = crossing = 0.0
    uncounted: dict[str, float] = collections.defaultdict(float)
    collectives: dict[str, float] = collections.defaultdict(float)
    for name, times in number.items():
        computation = program.computations[name]
        repeated = _continues_collective(name, computation)
        for instruction in computation.values():
            flops += times * _flops(computation, instruction)
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not repeated:
                sent = times * _collective_bytes(computation, instruction, kind)
                crossing += sent if slice_size and _crosses(instruction, slice_size) else 0.0
                # A TPU's text has a reduce-scatter as a reduction of which each device keeps its part.
                scattered = kind == "all-reduce" and "all-reduce-scatter" in name
                collectives["reduce-scatter" if scattered else kind] += sent
            elif instruction.opcode == "send" and "megascale" in instruction.rest:  # the part of a collective that goes to another slice
                sent = times * _given(computation, instruction)
                crossing += sent
                collectives["send"] += sent
            if name in fused:
                continue
            cycles += times * _cycles(instruction)
            if instruction.opcode == "custom-call":
                target = instruction.attribute(r'custom_call_target="([^"]+)"') or "unknown"
                uncounted[target] += times
            moved += times * _moved(program, computation, instruction)
    return Costs(flops, moved, cycles, dict(uncounted), dict(collectives), crossing)


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Two operations for every product that takes part, as the compiler counts: not those with padding or with holes."""
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    lhs, rhs = (computation_array(computation, name).shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if labels is None:
        raise HloError(f"convolution {instruction.name} has no dim_labels")
    l_in, l_kernel, l_out = re.split(r"_|->", labels)
    features = rhs[l_kernel.index("i")]
    total = 2.0 * features * out[l_out.index("b")] * out[l_out.index("f")]
    groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    options = dict(part.split("=") for part in window.split())
    spatial = sorted(c for c in l_out if c.isdigit())

    def each(key: str, default: str) -> list[str]:
        return options[key].split("x") if key in options else [default] * len(spatial)

    for i, axis in enumerate(spatial):
        low = int(each("pad", "0_0")[i].split("_")[0])
        total *= taps(
            lhs[l_in.index(axis)],
            rhs[l_kernel.index(axis)],
            out[l_out.index(axis)],
            int(each("stride", "1")[i]),
            low,
            int(each("lhs_dilate", "1")[i]),
            int(each("rhs_dilate", "1")[i]),
        )
    return total / groups


@functools.lru_cache(maxsize=4096)
def taps(size: int, kernel: int, out: int, stride: int, low: int, holes: int, spread: int) -> int:
    """How many (output, kernel) pairs along an axis meet a real input."""
    place = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * spread
    return int(np.sum((place >= 0) & (place <= (size - 1) * holes) & (place % holes == 0)))


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    shape = computation_array(computation, instruction.operands[0]).shape
    return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(shape[int(i)] for i in contracted.split(",") if i)


def computation_array(computation: Computation, name: str) -> Array:
    """The (first) array of a value."""
    return computation[name].arrays[0]


def _collective_bytes(computation: Computation, instruction: Instruction, kind: str) -> float:
    given = _given(computation, instruction)
    if kind != "all-gather":
        return given
    made = sum(a.nbytes for a in instruction.arrays)
    return made - given if instruction.opcode.endswith("-start") else made


def _given(computation: Computation, instruction: Instruction) -> float:
    return float(sum(a.nbytes for name in instruction.operands if name in computation for a in computation[name].arrays))


def _continues_collective(name: str, computation: Computation) -> bool:
    """Whether the collective within is one that another computation has begun.

    A collective that runs beside other work is written down in the fusion that starts it, in those that carry it on, and in the one
    that waits for it.
    """
    done = any(i.opcode == "custom-call" and i.attribute(r'custom_call_target="([^"]+)"') == "AsyncCollectiveDone" for i in computation.values())
    return done or name.startswith("async_collective_fusion")


def _crosses(instruction: Instruction, slice_size: int) -> bool:
    """Whether a group of the collective has devices of several slices; devices are numbered slice by slice. Without groups all are one."""
    if "replica_groups={}" in instruction.rest:
        return True
    pairs = instruction.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")
    listed = pairs or instruction.attribute(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
    if listed is not None:
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed)]
    else:
        groups = _numbered_groups(instruction)
    return any(len({n // slice_size for n in group}) > 1 for group in groups)


def _numbered_groups(instruction: Instruction) -> list[list[int]]:
    """Groups in the forms [4,2]<=[2,4]T(1,0) and mesh['a'=2,'b'=4] {'b'}."""
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest)
    if found is not None:
        shape = [int(n) for n in found.group(3).split(",")]
        order = [int(n) for n in (found.group(4) or ",".join(map(str, range(len(shape))))).split(",")]
        return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(int(found.group(1)), int(found.group(2))).tolist()
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.rest)
    if found is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        along = re.findall(r"'(\w+)'", found.group(2))
        names = list(sizes)
        order = [names.index(n) for n in names if n not in along] + [names.index(n) for n in along]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())).transpose(order)
        return ids.reshape(-1, math.prod(sizes[n] for n in along)).tolist()
    raise HloError(f"the groups of {instruction.name} cannot be read: {instruction.rest[:200]}")


_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id", "replica-id")


def _moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    """HBM bytes of one run. Of a value that is only sliced, or of which only a slice is replaced, the slice."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
        return 0.0
    if opcode == "custom-call" and instruction.attribute(r'custom_call_target="([^"]+)"') in ("AllocateBuffer", "ConcatBitcast"):
        return 0.0
    operands = [computation[name] for name in instruction.operands if name in computation]
    if opcode in ("dynamic-slice", "slice"):
        return 2.0 * _in_hbm(instruction.arrays)
    if opcode in ("slice-start", "dynamic-slice-start"):  # its result is (what is sliced, the slice, a signal)
        part = instruction.arrays[len(operands[0].arrays)]
        return float(part.nbytes * (part.in_hbm + operands[0].arrays[0].in_hbm))
    if opcode == "dynamic-update-slice":
        return float(operands[1].arrays[0].nbytes * (instruction.arrays[0].in_hbm + operands[1].arrays[0].in_hbm))
    if opcode == "copy-start":  # (the copy, what is copied, a signal)
        return float(_in_hbm(instruction.arrays[:2]))
    given = sum(_in_hbm(value.arrays) for value in operands)
    if opcode in ("send", "recv"):  # the result of a send holds its operand
        return float(given or _in_hbm(instruction.arrays[:1]))
    if opcode != "fusion":
        held = given if opcode in ("all-gather-start", "collective-permute-start") else 0  # their result holds their operand
        return float(given + _in_hbm(instruction.arrays) - held)
    inner = instruction.called[0]
    read = written = 0.0
    for i, name in enumerate(instruction.operands):
        if name in computation and (whole := _in_hbm(computation[name].arrays)):
            sliced = _read(program, inner, _parameter(program, inner, i))
            read += whole if sliced is None else min(whole, sliced)
    root = program.roots[inner]
    results = program.computations[inner][root].operands if program.computations[inner][root].opcode == "tuple" else (root,)
    for array, result in zip(instruction.arrays, results, strict=False):
        if array.in_hbm:
            part = _replaced(program, inner, result)
            written += array.nbytes if part is None else min(array.nbytes, part)
    return read + written


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(a.nbytes for a in arrays if a.in_hbm)


def _parameter(program: Program, name: str, index: int) -> str | None:
    found = (p.name for p in program.computations[name].values() if p.opcode == "parameter" and p.rest.startswith(f"({index})"))
    return next(found, None)


def _read(program: Program, name: str, value: str | None) -> int | None:
    """Bytes that a fused computation reads of a value of which it takes slices only; None where it takes all."""
    if value is None:
        return None
    computation, total = program.computations[name], 0
    for user in computation.values():
        for i, operand in enumerate(user.operands):
            if operand != value:
                continue
            inner: int | None
            if user.opcode in ("dynamic-slice", "slice"):
                inner = user.arrays[0].nbytes
            elif user.opcode == "dynamic-update-slice" and i == 0:
                inner = 0 if user.name == program.roots[name] else _read(program, name, user.name)
            elif user.opcode == "fusion":
                inner = _read(program, user.called[0], _parameter(program, user.called[0], i))
            elif user.opcode == "bitcast":
                inner = None if user.name == program.roots[name] else _read(program, name, user.name)
            elif user.opcode == "tuple" and user.name == program.roots[name]:
                inner = 0  # what is only replaced in part and handed out
            else:
                inner = None
            if inner is None:
                return None
            total += inner
    return total


def _replaced(program: Program, name: str, value: str) -> int | None:
    """Bytes that a fused computation writes for a result that is one of its arguments with a slice replaced; None where it writes all."""
    computation, total = program.computations[name], 0
    while True:
        made = computation[value]
        if made.opcode == "bitcast":
            value = made.operands[0]
        elif made.opcode == "dynamic-update-slice":
            total += computation[made.operands[1]].arrays[0].nbytes
            value = made.operands[0]
        elif made.opcode == "fusion" and len(made.arrays) == 1:
            inner = _replaced(program, made.called[0], program.roots[made.called[0]])
            return None if inner is None else total + inner
        else:
            return total if made.opcode == "parameter" and total else None
