"""How many floating-point operations a traced program does, loops counted as often as they run.

XLA's own cost analysis takes the body of a loop once, and networks here are loops over equal layers. Only matrix products
and convolutions are counted, two operations for a multiplication and an addition; what is computed again in the backward
pass counts again.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["count_flops"]


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
        elif name == "cond":
            total += max(map(count_flops, parameters["branches"]))
        else:
            total += parameters.get("length", 1) * sum(map(count_flops, _inner(parameters)))
    return total


def _convolution(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
    products = kernel.size // kernel.shape[numbers.rhs_spec[0]]
    # Zeros between the inputs, which the gradient of a strided convolution has, cost nothing.
    holes = math.prod(equation.params["lhs_dilation"])
    return 2 * equation.outvars[0].aval.size * products / holes / equation.params["batch_group_count"]


def _inner(parameters: dict[str, Any]) -> list[Any]:
    """The programs within an operation; a custom derivative's rules are not run, only its function."""
    values = [value for key, value in parameters.items() if not key.endswith(("_fun", "_thunk", "bwd", "fwd"))]
    return [value for value in values if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")]
