"""The image adapter's share in cross-attention: one more pair of key and value projections for every UNet site.

In SDXL there are 70 of them. The published file numbers them by the position of the site in diffusers'
`unet.attn_processors`, where the up blocks come before the middle: see `site_numbers`.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import ComputeConfig, UNetConfig
from instantid_jax.models.encoder import SiteKeysValues
from instantid_jax.nn.attention import KeysValues, split_heads
from instantid_jax.nn.linear import Linear
from instantid_jax.nn.stacking import map_layers, stack_of


class IdentityProjection(nnx.Module):
    """`to_k_ip` and `to_v_ip` of one cross-attention layer; no biases."""

    def __init__(self, context_channels: int, channels: int, heads: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(compute.dtype)
        self.heads = heads
        self.to_k_ip = Linear(context_channels, channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v_ip = Linear(context_channels, channels, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b m c"]) -> KeysValues:
        return KeysValues(split_heads(self.to_k_ip(tokens), self.heads), split_heads(self.to_v_ip(tokens), self.heads))


class AdapterLayer(nnx.Module):
    """Stands where the UNet has a transformer block, so that paths are the UNet's own."""

    def __init__(self, context_channels: int, channels: int, heads: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.attn2 = IdentityProjection(context_channels, channels, heads, compute=compute, rngs=rngs)


class AdapterSite(nnx.Module):
    """Stands where the UNet has a `Transformer2D`: the projections of its blocks, stacked."""

    def __init__(self, config: UNetConfig, level: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        sizes = config.cross_attention_dim, config.block_out_channels[level], config.attention_head_dim[level]
        depth = config.transformer_layers_per_block[level]
        self.transformer_blocks = stack_of(lambda r: AdapterLayer(*sizes, compute=compute, rngs=r), depth, rngs)


class AdapterBlock(nnx.Module):
    """Stands where the UNet has a block: its sites, possibly none."""

    def __init__(self, config: UNetConfig, level: int, count: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        self.attentions = nnx.List([AdapterSite(config, level, compute=compute, rngs=rngs) for _ in range(count)])


class Adapter(nnx.Module):
    """Identity tokens to the keys and values of every cross-attention of the UNet."""

    def __init__(self, config: UNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        levels = len(config.block_out_channels)
        down = [config.layers_per_block if block.startswith("CrossAttn") else 0 for block in config.down_block_types]
        up = [config.layers_per_block + 1 if block.startswith("CrossAttn") else 0 for block in config.up_block_types]
        self.down_blocks = nnx.List([AdapterBlock(config, i, count, compute=compute, rngs=rngs) for i, count in enumerate(down)])
        self.up_blocks = nnx.List([AdapterBlock(config, levels - 1 - i, count, compute=compute, rngs=rngs) for i, count in enumerate(up)])
        self.mid_block = AdapterBlock(config, levels - 1, 1, compute=compute, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b m c"]) -> SiteKeysValues:
        """`tokens` are the resampler's. The result is constant over the denoising steps: computed once a picture."""
        named = [(f"down_blocks/{i}", block) for i, block in enumerate(self.down_blocks)]
        named += [(f"up_blocks/{i}", block) for i, block in enumerate(self.up_blocks)]
        named += [("mid_block", self.mid_block)]
        return {
            f"{name}/attentions/{j}": map_layers(site.transformer_blocks, lambda layer: layer.attn2(tokens))
            for name, block in named
            for j, site in enumerate(block.attentions)
        }


def site_numbers(config: UNetConfig) -> dict[int, str]:
    """The published number of every cross-attention layer, and the path of its projections in this package.

    diffusers counts all attention layers (self- and cross-) in the order down, up, middle; cross-attention layers have the
    odd numbers: 1 to 139 in SDXL.
    """
    levels = len(config.block_out_channels)
    sites: list[tuple[str, int]] = []
    for i, block in enumerate(config.down_block_types):
        if block.startswith("CrossAttn"):
            sites += [(f"down_blocks/{i}/attentions/{j}", i) for j in range(config.layers_per_block)]
    for i, block in enumerate(config.up_block_types):
        if block.startswith("CrossAttn"):
            sites += [(f"up_blocks/{i}/attentions/{j}", levels - 1 - i) for j in range(config.layers_per_block + 1)]
    sites.append(("mid_block/attentions/0", levels - 1))
    layers = [f"{site}/transformer_blocks/{k}/attn2" for site, level in sites for k in range(config.transformer_layers_per_block[level])]
    return {2 * n + 1: path for n, path in enumerate(layers)}
