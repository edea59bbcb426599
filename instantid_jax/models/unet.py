"""The SDXL UNet: predicts the noise in a latent from the diffusion time, text, sizes and, beside the text, an identity.

    eps_theta(z_t, t, C, C_i)        InstantID (arXiv 2401.07519), equation 3

The base network is frozen. Identity comes in at two places: IdentityNet's residuals are added to the skips and to the
middle, and every cross-attention adds the image adapter's decoupled attention (`nn.attention`, equation 2).
Corresponds to diffusers' `UNet2DConditionModel`; attribute names are the same.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import ComputeConfig, UNetConfig
from instantid_jax.models.encoder import AddedConditions, Encoder, IdentityContext, TextContext, attend, make_transformer
from instantid_jax.nn.conv import Conv, Upsample
from instantid_jax.nn.norm import GroupNorm
from instantid_jax.nn.resnet import ResnetBlock
from instantid_jax.nn.transformer import Transformer2D


class Residuals(NamedTuple):
    """What IdentityNet (or the sum of several ControlNets) adds to the UNet: one array for each skip, one for the middle."""

    down: list[Float[Array, "b h w c"]]
    mid: Float[Array, "b h w c"]


class UpBlock(nnx.Module):
    """Residual blocks on [x, skip], a transformer after each where there is attention, then an enlargement but in the last."""

    def __init__(self, config: UNetConfig, index: int, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, levels = jnp.dtype(compute.dtype), len(config.block_out_channels)
        level = levels - 1 - index
        channels = config.block_out_channels[level]
        below = config.block_out_channels[min(level + 1, levels - 1)]
        above = config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block + 1
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    (below if j == 0 else channels) + (above if j == count - 1 else channels),
                    channels,
                    config.norm_num_groups,
                    config.norm_eps,
                    time_channels=config.time_embed_dim,
                    dtype=dtype,
                    rngs=rngs,
                )
                for j in range(count)
            ]
        )
        has_attention = config.up_block_types[index] == "CrossAttnUpBlock2D"
        self.attentions = nnx.List([make_transformer(config, level, compute=compute, rngs=rngs) for _ in range(count if has_attention else 0)])
        self.upsamplers = nnx.List([] if level == 0 else [Upsample(channels, dtype=dtype, rngs=rngs)])


class UNet(Encoder):
    """SDXL-shaped UNet with decoupled identity attention."""

    def __init__(self, config: UNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        super().__init__(config, compute=compute, rngs=rngs)
        channels = config.block_out_channels[0]
        self.up_blocks = nnx.List([UpBlock(config, i, compute=compute, rngs=rngs) for i in range(len(config.block_out_channels))])
        self.conv_norm_out = GroupNorm(channels, config.norm_num_groups, config.norm_eps, dtype=self.dtype, rngs=rngs)
        self.conv_out = Conv(channels, config.out_channels, dtype=self.dtype, rngs=rngs)

    def sites(self) -> dict[str, Transformer2D]:
        """Every transformer by its path, in the order of the published adapter's numbering: down, up, middle."""
        encoder = super().sites()
        down = {site: a for site, a in encoder.items() if site.startswith("down")}
        up = {f"up_blocks/{i}/attentions/{j}": a for i, block in enumerate(self.up_blocks) for j, a in enumerate(block.attentions)}
        return down | up | {site: a for site, a in encoder.items() if site.startswith("mid")}

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Float[Array, "*b"],
        text: TextContext,
        added: AddedConditions | None = None,
        *,
        identity: IdentityContext | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Array, "b h w c"]:
        """Predicted noise (or v, as the base was trained).

        `sample` is the latent scaled for the model, any height and width of at least the deepest block's; `timestep` may
        be fractional. `text` comes from `project_context`, `identity` from the image adapter, `residuals` from
        IdentityNet, already multiplied by its strength.
        """
        time = self.embed_time(timestep, added, sample.shape[0])
        return self.predict(sample, time, text, identity=identity, residuals=residuals)

    def predict(
        self,
        sample: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        text: TextContext,
        *,
        identity: IdentityContext | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Array, "b h w c"]:
        """The same with `embed_time` of the diffusion time already done."""
        x, skips = self._enter(sample, time, text, identity, residuals)
        return self._leave(self._go_up(x, skips, time, text, identity, 0))

    def predict_whole(
        self,
        sample: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        text: TextContext,
        branch: int,
        *,
        identity: IdentityContext | None = None,
        residuals: Residuals | None = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 c2"]]:
        """`predict`, and what the way up has where the skip numbered `branch` comes in (0 is the outermost): `predict_outer` takes it."""
        x, skips = self._enter(sample, time, text, identity, residuals)
        deep = self._go_up(x, skips, time, text, identity, branch + 1)
        return self._leave(self._go_up(deep, skips, time, text, identity, 0)), deep

    def predict_outer(
        self,
        sample: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        text: TextContext,
        branch: int,
        deep: Float[Array, "b h2 w2 c2"],
        *,
        identity: IdentityContext | None = None,
        residuals: list[Float[Array, "b _h _w _c"]] | None = None,
    ) -> Float[Array, "b h w c"]:
        """`predict` with `deep` from an earlier step in place of all that lies within the skip numbered `branch` (DeepCache, arXiv
        2312.00858, section 3.2): of the network only its first `branch` layers and its last `branch` + 1 are computed.

        `residuals` are those of the first `branch` + 1 skips.
        """
        skips = list(itertools.islice(self.skips(self.conv_in(sample), time, text, identity), branch + 1))
        if residuals is not None:
            skips = [skip + r for skip, r in zip(skips, residuals, strict=True)]
        return self._leave(self._go_up(deep, skips, time, text, identity, 0))

    def _enter(
        self, sample: Array, time: Array, text: TextContext, identity: IdentityContext | None, residuals: Residuals | None
    ) -> tuple[Array, list[Array]]:
        """The way down and the middle, with the residuals added."""
        x, skips = self.go_down(self.conv_in(sample), time, text, identity)
        if residuals is not None:
            skips = [skip + r for skip, r in zip(skips, residuals.down, strict=True)]
            x = x + residuals.mid
        return x, skips

    def _go_up(self, x: Array, skips: list[Array], time: Array, text: TextContext, identity: IdentityContext | None, stop: int) -> Array:
        """The layers of the way up, each taking the last of `skips`, until `stop` of them are left."""
        per_block = self.config.layers_per_block + 1
        while len(skips) > stop:
            i, j = divmod(per_block * len(self.up_blocks) - len(skips), per_block)
            block = self.up_blocks[i]
            x = self.residual(block.resnets[j], jnp.concatenate([x, skips.pop()], axis=-1), time)
            if block.attentions:
                x = attend(block.attentions[j], f"up_blocks/{i}/attentions/{j}", x, text, identity)
            for upsampler in block.upsamplers if j == per_block - 1 else ():
                _, h, w, _ = skips[-1].shape  # twice the size, or one less where the way down met an odd one
                x = upsampler(x, (h, w))
        return x

    def _leave(self, x: Array) -> Array:
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
