"""The linear layer, and kernels stored as 8-bit integers.

    kernel[..., o] = scale[o] * q[..., o],   q whole in -127..127,   scale[o] = max |kernel[..., o]| / 127        (1)
    x kernel = (x q) * scale                                                                                      (2)

(1) is symmetric quantisation with one scale for every output channel; (2) holds for convolutions too, so that the product
is computed with the integers, cast to the type of the arithmetic, which holds them exactly, and only its result is scaled.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.nn.conv import Conv, inside_the_loop
from instantid_jax.nn.placement import gathered, tensor_axis
from instantid_jax.paths import Tree, flatten, stacked_layer, unflatten

_LARGEST = 127


class Linear(nnx.Linear):
    """x kernel + bias; after `store_int8` by equation (2)."""

    kernel_scale: nnx.Param[Array]
    tensor_axis: int | None = None
    """Of the kernel, by the table of `nn.placement`."""

    def __call__(self, inputs: Float[Array, "... c"], out_sharding: Any = None) -> Float[Array, "... c2"]:
        dtype, kernel, rounded = self.dtype or inputs.dtype, self.kernel[...], hasattr(self, "kernel_scale")
        if rounded:
            kernel, inputs = inside_the_loop(kernel, inputs)
        y = inputs.astype(dtype) @ gathered(kernel, dtype, self.tensor_axis)
        if rounded:
            y = y * self.kernel_scale[...].astype(dtype)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def name_tensor_axes(module: nnx.Module) -> None:
    """Tells every linear layer within `module`, by its path, along which axis its kernel is split over `tensor`."""
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear):
            layer.tensor_axis = tensor_axis("/".join(map(str, (*path, "kernel"))))


def store_int8(module: nnx.Module) -> None:
    """Makes every linear layer and convolution within `module` one whose kernel is 8-bit: `quantize` gives the numbers."""
    layers = [layer for _, layer in nnx.iter_modules(module) if isinstance(layer, Linear | Conv)]
    for layer in layers:
        kernel = layer.kernel[...]
        leading = kernel.ndim - (4 if isinstance(layer, Conv) else 2)
        layer.kernel = nnx.Param(jnp.zeros(kernel.shape, jnp.int8))
        layer.kernel_scale = nnx.Param(jnp.zeros((*kernel.shape[:leading], kernel.shape[-1])))


def quantize(parameters: Mapping[str, Any], dtype: Any = jnp.float32) -> Tree:
    """Equation (1) on every kernel of a tree, one after the other; what is no kernel becomes `dtype`. Scales are float32.

    A channel of zeros has scale 1.
    """
    out: dict[str, Any] = {}
    for path, leaf in flatten(parameters).items():
        if path.rsplit("/", 1)[-1] != "kernel":
            out[path] = jnp.asarray(leaf).astype(dtype)
            continue
        kernel = jnp.asarray(leaf).astype(jnp.float32)
        axes = tuple(range(1 if stacked_layer(path) else 0, kernel.ndim - 1))
        largest = jnp.abs(kernel).max(axes, keepdims=True)
        scale = jnp.where(largest == 0, 1.0, largest / _LARGEST)
        out[path] = jnp.round(kernel / scale).astype(jnp.int8)
        out[f"{path}_scale"] = scale.squeeze(axes)
    return unflatten(out)
