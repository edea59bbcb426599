"""How many floating-point operations a traced program does, loops counted as often as they run.

XLA's own cost analysis takes the body of a loop once, and networks here are loops over equal layers. Only matrix products
and convolutions are counted, two operations for a multiplication and an addition; what is computed again in the backward
pass counts again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from instantid_jax.parallel.hlo import taps

__all__ = ["count_flops", "kernel_flops", "minimum_flops"]


def count_flops(jaxpr: Any) -> float:
    """Operations of a (closed) jaxpr over all devices. The body of a loop of unknown length counts once."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "shard_map":
            total += parameters["mesh"].size * count_flops(parameters["jaxpr"])
        elif name == "pallas_call":
            total += math.prod(parameters["grid_mapping"].grid) * count_flops(parameters["jaxpr"])
        elif name == "cond":
            total += max(map(count_flops, parameters["branches"]))
        else:
            total += parameters.get("length", 1) * sum(map(count_flops, _inner(parameters)))
    return total


def kernel_flops(jaxpr: Any) -> float:
    """The part of `count_flops` that is within Pallas kernels, of one device: the compiler does not see it."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            total += math.prod(equation.params["grid_mapping"].grid) * count_flops(equation.params["jaxpr"])
        else:
            total += equation.params.get("length", 1) * sum(map(kernel_flops, _inner(equation.params)))
    return total


def minimum_flops(jaxpr: Any, trained: Sequence[bool]) -> float:
    """The least that a function and its gradient with respect to some of its inputs cost, from the function alone.

    A product costs once for its result and once more for the gradient of each operand that depends on a trained input: a
    frozen layer behind a trained one twice, a trained one three times, one that no trained input reaches once.
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
        if name in ("dot_general", "conv_general_dilated"):
            total += count_flops(_Single([equation])) * (1 + sum(inputs[:2]))
        elif name == "cond":
            parts = [_minimum(branch.jaxpr, inputs[1:]) for branch in parameters["branches"]]
            total += max(flops for flops, _ in parts)
            outputs = [any(flags) for flags in zip(*(part[1] for part in parts), strict=True)]
        elif name == "scan":
            flops, outputs = _minimum_of_scan(parameters, inputs)
            total += flops
        elif name == "stop_gradient":
            outputs = [False] * len(equation.outvars)
        elif inner := _inner(parameters):
            body = getattr(inner[0], "jaxpr", inner[0])
            flops, outputs = _minimum(body, inputs[-len(body.invars) :] if body.invars else [])
            total += flops
        depends.update(zip(equation.outvars, outputs or [any(inputs)] * len(equation.outvars), strict=True))
    return total, [not hasattr(v, "val") and depends.get(v, False) for v in jaxpr.outvars]


def _minimum_of_scan(parameters: dict[str, Any], inputs: list[bool]) -> tuple[float, list[bool]]:
    body, constants, carried = parameters["jaxpr"].jaxpr, parameters["num_consts"], parameters["num_carry"]
    while True:  # what is carried may come to depend on a trained input in a later round
        flops, outputs = _minimum(body, inputs)
        before = inputs[constants : constants + carried]
        after = [a or b for a, b in zip(before, outputs[:carried], strict=True)]
        if after == before:
            return parameters["length"] * flops, outputs
        inputs = [*inputs[:constants], *after, *inputs[constants + carried :]]


class _Single(NamedTuple):
    eqns: list[Any]


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
