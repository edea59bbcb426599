"""Embeddings of scalars: the diffusion time, and SDXL's six size numbers.

sinusoid(t)_i = [cos(t f_i), sin(t f_i)],  f_i = 10000^(-i / (D/2)),  i = 0 .. D/2 - 1
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.nn.linear import Linear


def sinusoid(t: Float[Array, "*b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Float[Array, "*b {dim}"]:
    """Sinusoidal features of `t` in float32; cosines first where `flip_sin_to_cos`. `t` may be fractional."""
    half = dim // 2
    # Constants, so made in double precision here: angles reach 1000 radians, and the devices' own exponentials differ.
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift)).astype(np.float32)
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear: from sinusoidal features to the vector that every residual block adds."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(channels_out, channels_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c2"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
