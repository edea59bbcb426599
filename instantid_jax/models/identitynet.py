"""IdentityNet: a ControlNet whose picture is five facial keypoints and whose cross-attention sees identity tokens, not text.

The network is the encoder of the UNet; its outputs pass 1x1 convolutions that start at zero and are added to the UNet's
skips and middle. Text enters only as the pooled embedding beside the time (arXiv 2401.07519, section 3.3, and the
published weights). Corresponds to diffusers' `ControlNetModel`, so the class is also any stock SDXL ControlNet: those are
given text tokens as context.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instantid_jax.config import ComputeConfig, IdentityNetConfig
from instantid_jax.models.encoder import AddedConditions, Encoder, TextContext
from instantid_jax.models.unet import Residuals
from instantid_jax.nn.conv import Conv


class ConditioningEmbedding(nnx.Module):
    """From the control picture at full resolution to features at the latent's: convolutions, three of them halving."""

    def __init__(self, config: IdentityNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        dtype, widths = jnp.dtype(compute.dtype), config.conditioning_embedding_out_channels
        self.conv_in = Conv(config.conditioning_channels, widths[0], dtype=dtype, rngs=rngs)
        blocks: list[Conv] = []
        for narrow, wide in itertools.pairwise(widths):
            blocks.append(Conv(narrow, narrow, dtype=dtype, rngs=rngs))
            blocks.append(Conv(narrow, wide, stride=2, dtype=dtype, rngs=rngs))
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv(widths[-1], config.block_out_channels[0], zero=True, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        x = jax.nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class IdentityNet(Encoder):
    """SDXL-shaped ControlNet."""

    config: IdentityNetConfig

    def __init__(self, config: IdentityNetConfig, *, compute: ComputeConfig, rngs: nnx.Rngs):
        super().__init__(config, compute=compute, rngs=rngs)
        self.controlnet_cond_embedding = ConditioningEmbedding(config, compute=compute, rngs=rngs)
        widths = [config.block_out_channels[0]]
        for i, channels in enumerate(config.block_out_channels):
            last = i == len(config.block_out_channels) - 1
            widths += [channels] * (config.layers_per_block + (0 if last else 1))
        self.controlnet_down_blocks = nnx.List([Conv(c, c, 1, zero=True, dtype=self.dtype, rngs=rngs) for c in widths])
        self.controlnet_mid_block = Conv(widths[-1], widths[-1], 1, zero=True, dtype=self.dtype, rngs=rngs)

    def embed_condition(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Features of the control picture (RGB, 0 to 1). The same in every denoising step, so computed once."""
        return self.controlnet_cond_embedding(image.astype(self.dtype))

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Float[Array, "*b"],
        context: TextContext,
        added: AddedConditions | None,
        condition: Float[Array, "b h w c0"],
    ) -> Residuals:
        """Residuals for the UNet, before any strength.

        `context` is `project_context` of the 16 identity tokens (of text tokens in a stock ControlNet), `condition` is
        `embed_condition` of the control picture.
        """
        return self.residuals(sample, self.embed_time(timestep, added, sample.shape[0]), context, condition)

    def residuals(
        self, sample: Float[Array, "b h w c"], time: Float[Array, "b t"], context: TextContext, condition: Float[Array, "b h w c0"]
    ) -> Residuals:
        """The same with `embed_time` of the diffusion time already done."""
        x, skips = self.go_down(self.conv_in(sample) + condition, time, context, None)
        down = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return Residuals(down, self.controlnet_mid_block(x))

    def outer_residuals(
        self, sample: Float[Array, "b h w c"], time: Float[Array, "b t"], context: TextContext, condition: Float[Array, "b h w c0"], count: int
    ) -> list[Float[Array, "b h2 w2 c2"]]:
        """The first `count` of the residuals of the skips; nothing else is computed."""
        skips = itertools.islice(self.skips(self.conv_in(sample) + condition, time, context, None), count)
        return [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=False)]
