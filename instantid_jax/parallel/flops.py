"""How many floating-point operations a traced program does, loops counted as often as they run.

XLA's own cost analysis takes the body of a loop once, and networks here are loops over equal layers. Only matrix products
and convolutions are counted, two operations for a multiplication and an addition; what is computed again in the backward
pass counts again. Of the branches of a condition the dearest counts, or, in `executed_flops`, the one that is taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from instantid_jax.parallel.hlo import taps

__all__ = ["count_flops", "executed_flops", "kernel_flops", "minimum_flops"]

_KNOWN_SIZE = 1 << 16  # elements; larger arrays decide no branch


def count_flops(jaxpr: Any) -> float:
    """Operations of a (closed) jaxpr over all devices. The body of a loop of unknown length counts once."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "shard_map":
            total += parameters["mesh"].size * count_flops(parameters["jaxpr"])
        elif name == "pallas_call":
            total += math.prod(parameters["grid_mapping"].grid) * count_flops(parameters["jaxpr"])
        elif name == "cond":
            total += max(map(count_flops, parameters["branches"]))
        elif name in _PRODUCTS:
            total += _product(equation)
        else:
            total += parameters.get("length", 1) * sum(map(count_flops, _inner(parameters)))
    return total


def kernel_flops(jaxpr: Any) -> float:
    """The part of `count_flops` that is within Pallas kernels, of one device: the compiler does not see it."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            total += math.prod(equation.params["grid_mapping"].grid) * count_flops(equation.params["jaxpr"])
        elif equation.primitive.name == "cond":
            total += max(map(kernel_flops, equation.params["branches"]))
        else:
            total += equation.params.get("length", 1) * sum(map(kernel_flops, _inner(equation.params)))
    return total


def minimum_flops(jaxpr: Any, trained: Sequence[bool]) -> float:
    """The least that a function and its gradient with respect to some of its inputs cost, from the function alone.

    A product costs once for its result and once more for the gradient of each operand that depends on a trained input: a
    frozen layer behind a trained one twice, a trained one three times, one that no trained input reaches once. Raises
    ValueError for a kernel behind a trained input.
    """
    return _minimum(getattr(jaxpr, "jaxpr", jaxpr), list(trained))[0]


def _minimum(jaxpr: Any, trained: list[bool]) -> tuple[float, list[bool]]:
    """FLOPs, and which results depend on trained inputs."""
    depends = dict(zip(jaxpr.invars, trained, strict=True))
    total = 0.0
    for equation in jaxpr.eqns:
        # Literals cannot be keys, and depend on nothing.
        inputs = [not hasattr(v, "val") and depends.get(v, False) for v in equation.invars]
        name, parameters, outputs = equation.primitive.name, equation.params, None
        if name in _PRODUCTS:
            total += _product(equation) * (1 + sum(inputs[:2]))
        elif name == "cond":
            parts = [_minimum(branch.jaxpr, inputs[1:]) for branch in parameters["branches"]]
            total += max(flops for flops, _ in parts)
            outputs = [any(flags) for flags in zip(*(part[1] for part in parts), strict=True)]
        elif name == "scan":
            body = parameters["jaxpr"].jaxpr
            flops, outputs = _minimum_of_loop(body, parameters["num_consts"], parameters["num_carry"], inputs)
            total += parameters["length"] * flops
        elif name == "shard_map":
            flops, outputs = _minimum(parameters["jaxpr"], inputs)
            total += parameters["mesh"].size * flops
        elif name == "pallas_call":
            if any(inputs):
                raise ValueError("the least that a Pallas kernel's gradient costs is not known from its text: count its plain form")
            total += math.prod(parameters["grid_mapping"].grid) * count_flops(parameters["jaxpr"])
        elif name == "while":
            first = parameters["cond_nconsts"]
            flops, outputs = _minimum_of_loop(parameters["body_jaxpr"].jaxpr, parameters["body_nconsts"], len(equation.outvars), inputs[first:])
            total += flops  # of unknown length: once
        elif name == "stop_gradient":
            outputs = [False] * len(equation.outvars)
        elif inner := _inner(parameters):
            body = getattr(inner[0], "jaxpr", inner[0])
            flops, outputs = _minimum(body, inputs[-len(body.invars) :] if body.invars else [])
            total += flops
        depends.update(zip(equation.outvars, outputs or [any(inputs)] * len(equation.outvars), strict=True))
    return total, [not hasattr(v, "val") and depends.get(v, False) for v in jaxpr.outvars]


def _minimum_of_loop(body: Any, constants: int, carried: int, inputs: list[bool]) -> tuple[float, list[bool]]:
    """Of one turn of a loop, and which of its results depend on trained inputs."""
    while True:  # what is carried may come to depend on a trained input in a later round
        flops, outputs = _minimum(body, inputs)
        before = inputs[constants : constants + carried]
        after = [a or b for a, b in zip(before, outputs[:carried], strict=True)]
        if after == before:
            return flops, outputs
        inputs = [*inputs[:constants], *after, *inputs[constants + carried :]]


def executed_flops(jaxpr: Any, values: Sequence[Any]) -> float:
    """Operations of one run of a closed jaxpr whose branches depend on small known numbers alone.

    `values` are its flat arguments: arrays, or anything with a shape and no numbers (`jax.ShapeDtypeStruct`) where they are
    not known. Loops that hold conditions are gone through turn by turn. Raises ValueError for a branch that depends on what
    is not known.
    """
    return _run(jaxpr.jaxpr, jaxpr.consts, [None if isinstance(v, jax.ShapeDtypeStruct) else v for v in values])[0]


def _run(jaxpr: Any, constants: Sequence[Any], values: Sequence[Any]) -> tuple[float, list[Any]]:
    """Operations, and the results as far as they are known (else None)."""
    known: dict[Any, Any] = {}

    def put(variables: Sequence[Any], values: Sequence[Any]) -> None:
        known.update((var, v) for var, v in zip(variables, values, strict=True) if v is not None and np.size(v) <= _KNOWN_SIZE)

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else known.get(atom)

    put(jaxpr.constvars, constants)
    put(jaxpr.invars, values)
    total = 0.0
    for equation in jaxpr.eqns:
        flops, results = _execute(equation, [read(atom) for atom in equation.invars])
        total += flops
        put(equation.outvars, results)
    return total, [read(atom) for atom in jaxpr.outvars]


def _execute(equation: Any, inputs: list[Any]) -> tuple[float, list[Any]]:
    name, parameters, unknown = equation.primitive.name, equation.params, [None] * len(equation.outvars)
    if name == "cond":
        if inputs[0] is None:
            raise ValueError("a branch depends on values that are not known")
        branch = parameters["branches"][int(inputs[0])]
        return _run(branch.jaxpr, branch.consts, inputs[1:])
    if name in _PRODUCTS:
        return _product(equation), unknown
    inner = _inner(parameters)
    if name == "scan" and _has_branches(parameters["jaxpr"]):
        return _loop(parameters, inputs)
    if name == "while":
        return _while(parameters, inputs, unknown)
    if name == "shard_map":  # what is split is not known on one device
        flops, _ = _run(parameters["jaxpr"], (), [v if np.ndim(v) == 0 else None for v in inputs])
        return parameters["mesh"].size * flops, unknown
    if len(inner) == 1 and len((body := getattr(inner[0], "jaxpr", inner[0])).invars) == len(inputs) and name != "scan":
        return _run(body, getattr(inner[0], "consts", ()), inputs)
    if inner:
        return parameters.get("length", 1) * sum(map(_count_once, inner)), unknown
    if any(v is None for v in inputs) or equation.effects or max((var.aval.size for var in equation.outvars), default=0) > _KNOWN_SIZE:
        return 0.0, unknown
    results = equation.primitive.bind(*inputs, **parameters)
    return 0.0, list(results) if equation.primitive.multiple_results else [results]


def _loop(parameters: dict[str, Any], inputs: list[Any]) -> tuple[float, list[Any]]:
    """A scan, turn by turn."""
    body, length, constants, carried = parameters["jaxpr"], parameters["length"], parameters["num_consts"], parameters["num_carry"]
    fixed, carry, items = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]
    total = 0.0
    for turn in range(length)[:: -1 if parameters["reverse"] else 1]:
        flops, results = _run(body.jaxpr, body.consts, [*fixed, *carry, *(None if x is None else x[turn] for x in items)])
        total, carry = total + flops, results[:carried]
    return total, [*carry, *[None] * (len(body.jaxpr.outvars) - carried)]


def _while(parameters: dict[str, Any], inputs: list[Any], unknown: list[Any]) -> tuple[float, list[Any]]:
    """A loop with a condition, turn by turn. One whose end is not known must hold no products."""
    condition, body = parameters["cond_jaxpr"], parameters["body_jaxpr"]
    first, second = parameters["cond_nconsts"], parameters["cond_nconsts"] + parameters["body_nconsts"]
    outside, fixed, carry, total = inputs[:first], inputs[first:second], inputs[second:], 0.0
    if not _count_once(body):
        return 0.0, unknown
    while True:
        _, (goes_on,) = _run(condition.jaxpr, condition.consts, [*outside, *carry])
        if goes_on is None:
            raise ValueError("the length of a loop depends on values that are not known")
        if not goes_on:
            return total, carry
        flops, carry = _run(body.jaxpr, body.consts, [*fixed, *carry])
        total += flops


class _Same:
    """Identifies a jaxpr, which has no equality of its own."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr

    def __hash__(self) -> int:
        return id(self.jaxpr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.jaxpr is other.jaxpr


@functools.lru_cache(maxsize=4096)
def _counted(jaxpr: _Same) -> float:
    return count_flops(jaxpr.jaxpr)


def _count_once(jaxpr: Any) -> float:
    return _counted(_Same(jaxpr))


def _has_branches(jaxpr: Any) -> bool:
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return any(e.primitive.name == "cond" or any(map(_has_branches, _inner(e.params))) for e in equations)


_PRODUCTS = ("dot_general", "conv_general_dilated")


def _product(equation: Any) -> float:
    if equation.primitive.name == "conv_general_dilated":
        return _convolution(equation)
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Zeros around the inputs and between them (which the gradient of a strided convolution has) cost nothing."""
    parameters, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    batch, channels, *places = numbers.out_spec
    total = 2.0 * out[batch] * out[channels] * kernel[numbers.rhs_spec[1]] / parameters["batch_group_count"]
    for axis, place in enumerate(places):
        total *= taps(
            image[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            out[place],
            *(parameters["window_strides"][axis], parameters["padding"][axis][0]),
            *(parameters["lhs_dilation"][axis], parameters["rhs_dilation"][axis]),
        )
    return total


def _inner(parameters: dict[str, Any]) -> list[Any]:
    """The programs within an operation; a custom derivative's rules are not run, only its function."""
    values = [value for key, value in parameters.items() if not key.endswith(("_fun", "_thunk", "bwd", "fwd"))]
    return [value for value in values if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")]
