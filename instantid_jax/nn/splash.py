"""Attention on TPU: JAX's splash kernel (Pallas), which never writes the scores to memory.

A kernel is not split by the compiler, so under a mesh (`jax.set_mesh`) it runs in a `shard_map`: batches over `data` and
`fsdp`, heads over `tensor`, as the weights' rules have it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instantid_jax.nn.placement import on_each_device
from instantid_jax.nn.platform import target_platform

__all__ = ["fits", "splash_attention"]

_BLOCKS = (1024, 512, 256, 128)  # of queries and keys that are multiplied at once; those that divide the length, largest first
_WIDEST = 256  # channels a head that fit the scratch memory with the largest blocks


def fits(q: Array, k: Array) -> bool:
    """Whether the kernel takes these: lengths of whole blocks, heads that are not too wide, half precision."""
    lengths = q.shape[1] % _BLOCKS[-1] == 0 and k.shape[1] % _BLOCKS[-1] == 0
    return lengths and q.shape[-1] <= _WIDEST and q.dtype == jnp.bfloat16


def splash_attention(q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]) -> Float[Array, "b n k d"]:
    """softmax(q k^T / sqrt(d)) v without masks, softmax in float32."""
    return on_each_device(_local, q, k, v)


def _local(q: Array, k: Array, v: Array) -> Array:
    kernel = _kernel(q.shape[2], q.shape[1], k.shape[1])
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(kernel)(q, k, v).transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=64)
def _blocks(queries: int, keys: int) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    rows, columns = (next(block for block in _BLOCKS if n % block == 0) for n in (queries, keys))
    return splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=min(columns, 512),
        block_q_dkv=min(rows, 512),
        block_kv_dkv=min(columns, 512),
        block_kv_dkv_compute=min(columns, 512),
        use_fused_bwd_kernel=True,
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )


def _kernel(heads: int, queries: int, keys: int) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
    emulated = target_platform() != "tpu"  # for tests
    return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=_blocks(queries, keys), interpret=emulated)
