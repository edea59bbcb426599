"""What the SDXL UNet and IdentityNet have in common: the embeddings of time, text and sizes, the way down, the middle."""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from instantid_jax.config import ComputeConfig, UNetConfig
from instantid_jax.nn.attention import IdentitySite, KeysValues
from instantid_jax.nn.conv import Conv, Downsample
from instantid_jax.nn.embeddings import TimestepEmbedding, sinusoid
from instantid_jax.nn.resnet import ResnetBlock
from instantid_jax.nn.stacking import recomputed
from instantid_jax.nn.transformer import Transformer2D

SiteKeysValues = dict[str, KeysValues]
"""Cross-attention keys and values by the path of their `Transformer2D`, e.g. "down_blocks/1/attentions/0"."""


class AddedConditions(NamedTuple):
    """SDXL's micro-conditioning, which enters beside the diffusion time."""

    text_embeds: Float[Array, "b p"]
    """Pooled text embedding of the second text tower."""
    time_ids: Float[Array, "b 6"]
    """Original height and width, crop top and left, target height and width, in pixels; heights first."""


class TextContext(NamedTuple):
    """What cross-attention reads as text: projected once for a picture, used in every denoising step."""

    keys_values: SiteKeysValues
    mask: Bool[Array, "b 1 m"] | None = None


class IdentityContext(NamedTuple):
    """What the decoupled cross-attention reads as identity, beside the text."""

    keys_values: SiteKeysValues
    scale: Float[Array, ""] | dict[str, Array]
    """Strength of the image adapter (`ip_adapter_scale`); by site, [l] for its layers, or [l, p] for layers and people or places."""
    mask: Float[Array, "b H W *p"] | None = None
    """Where the identity acts, 0 to 1, at the picture's resolution; None is everywhere. Several people, or places of one, have one each."""

    def at(self, site: str) -> IdentitySite:
        """The part of one `Transformer2D`."""
        return IdentitySite(self.keys_values[site], self.scale[site] if isinstance(self.scale, dict) else self.scale, self.mask)


class DownBlock(nnx.Module):
    """Residual blocks, a transformer after each where `depth` > 0, then a halving convolution except in the last block."""

    def __init__(self, config: UNetConfig, index: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, channels = jnp.dtype(compute.dtype), config.block_out_channels
        previous = channels[max(index - 1, 0)]
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    previous if j == 0 else channels[index],
                    channels[index],
                    config.norm_num_groups,
                    config.norm_eps,
                    time_channels=config.time_embed_dim,
                    dtype=dtype,
                    rngs=rngs,
                )
                for j in range(config.layers_per_block)
            ]
        )
        has_attention = config.down_block_types[index] == "CrossAttnDownBlock2D"
        count = config.layers_per_block if has_attention else 0
        self.attentions = nnx.List([make_transformer(config, index, compute=compute, rngs=rngs) for _ in range(count)])
        last = index == len(channels) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(channels[index], dtype=dtype, rngs=rngs)])


class MidBlock(nnx.Module):
    """Residual block, transformer, residual block, at the lowest resolution."""

    def __init__(self, config: UNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        channels, dtype = config.block_out_channels[-1], jnp.dtype(compute.dtype)
        self.resnets = nnx.List(
            [
                ResnetBlock(channels, channels, config.norm_num_groups, config.norm_eps, time_channels=config.time_embed_dim, dtype=dtype, rngs=rngs)
                for _ in range(2)
            ]
        )
        self.attentions = nnx.List([make_transformer(config, len(config.block_out_channels) - 1, compute=compute, rngs=rngs)])


def make_transformer(config: UNetConfig, index: int, *, compute: ComputeConfig, rngs: nnx.Rngs) -> Transformer2D:
    """The transformer of resolution level `index`."""
    return Transformer2D(
        config.block_out_channels[index],
        config.cross_attention_dim,
        config.attention_head_dim[index],
        config.transformer_layers_per_block[index],
        config.norm_num_groups,
        linear=config.use_linear_projection,
        compute=compute,
        rngs=rngs,
    )


class Encoder(nnx.Module):
    """The encoder half of an SDXL-shaped network, with diffusers' attribute names."""

    def __init__(self, config: UNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, channels = jnp.dtype(compute.dtype), config.block_out_channels
        self.config, self.dtype, self.remat = config, dtype, compute.remat
        self.conv_in = Conv(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(channels[0], config.time_embed_dim, dtype=dtype, rngs=rngs)
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, config.time_embed_dim, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List([DownBlock(config, i, compute=compute, rngs=rngs) for i in range(len(channels))])
        self.mid_block = MidBlock(config, compute=compute, rngs=rngs)

    def sites(self) -> dict[str, Transformer2D]:
        """Every transformer by its path; the image adapter has one pair of projections for each of their blocks."""
        found = {f"down_blocks/{i}/attentions/{j}": a for i, block in enumerate(self.down_blocks) for j, a in enumerate(block.attentions)}
        return found | {f"mid_block/attentions/{j}": a for j, a in enumerate(self.mid_block.attentions)}

    def project_context(self, context: Float[Array, "b m c"], mask: Bool[Array, "b m"] | None = None) -> TextContext:
        """Cross-attention keys and values of a context (text tokens; for IdentityNet the identity tokens) at every site."""
        keys_values = {site: transformer.project(context) for site, transformer in self.sites().items()}
        return TextContext(keys_values, None if mask is None else mask[:, None])

    def embed_time(self, timestep: Float[Array, "*b"], added: AddedConditions | None, batch: int) -> Float[Array, "b t"]:
        """Embedding of the diffusion time plus, in SDXL, of pooled text and sizes. `timestep` is a scalar or one a sample."""
        config = self.config
        angles = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), (batch,))
        time = self.time_embedding(sinusoid(timestep, config.block_out_channels[0], **angles).astype(self.dtype))
        if config.addition_embed_type is None:
            return time
        if added is None:
            raise ValueError("this network needs AddedConditions (pooled text and sizes): its addition_embed_type is 'text_time'")
        sizes = sinusoid(added.time_ids, config.addition_time_embed_dim or 0, **angles).reshape(batch, -1)
        return time + self.add_embedding(jnp.concatenate([added.text_embeds, sizes], axis=-1).astype(self.dtype))

    def go_down(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"], text: TextContext, identity: IdentityContext | None
    ) -> tuple[Float[Array, "b h2 w2 c2"], list[Array]]:
        """Down blocks and middle block. Returns the middle's output and all the `skips`."""
        skips = list(self.skips(x, time, text, identity))
        x = self.residual(self.mid_block.resnets[0], skips[-1], time)
        x = attend(self.mid_block.attentions[0], "mid_block/attentions/0", x, text, identity)
        return self.residual(self.mid_block.resnets[1], x, time), skips

    def skips(self, x: Float[Array, "b h w c"], time: Float[Array, "b t"], text: TextContext, identity: IdentityContext | None) -> Iterator[Array]:
        """What the way down leaves for the way up: the input, then every residual block's (or transformer's) and every halving's
        output. Layers beyond the last skip that is asked for are not computed."""
        yield x
        for i, block in enumerate(self.down_blocks):
            for j, resnet in enumerate(block.resnets):
                x = self.residual(resnet, x, time)
                if block.attentions:
                    x = attend(block.attentions[j], f"down_blocks/{i}/attentions/{j}", x, text, identity)
                yield x
            for downsampler in block.downsamplers:
                x = downsampler(x)
                yield x

    def residual(self, block: ResnetBlock, x: Array, time: Array) -> Array:
        """Runs a residual block, which `ComputeConfig.remat` "full" computes again in the backward pass."""
        return recomputed(lambda x, time: block(x, time), "full" if self.remat == "full" else "none")(x, time)


def attend(transformer: Transformer2D, site: str, x: Array, text: TextContext, identity: IdentityContext | None) -> Array:
    """Runs one transformer with the parts of the contexts that belong to it."""
    return transformer(x, text.keys_values[site], text.mask, None if identity is None else identity.at(site))
