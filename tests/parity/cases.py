"""The configurations and inputs on which whole networks are compared."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from oracle import nchw, random

from instantid_jax.config import AutoencoderConfig, CLIPTextConfig, IdentityNetConfig, ModelConfig, ResamplerConfig, UNetConfig, tiny

DEV = Path(__file__).parents[1] / "golden" / "dev"


def golden_config() -> ModelConfig:
    """The golden case's model, from its published files; its resampler has InstantID's own size."""

    def read(part: str) -> Any:
        return json.loads((DEV / part / "config.json").read_text())

    return ModelConfig(
        unet=UNetConfig.from_published(read("base/unet")),
        identitynet=IdentityNetConfig.from_published(read("instantid/ControlNetModel")),
        resampler=ResamplerConfig(output_dim=80),
        vae=AutoencoderConfig.from_published(read("base/vae")),
        text_encoder=CLIPTextConfig.from_published(read("base/text_encoder"), with_projection=False),
        text_encoder_2=CLIPTextConfig.from_published(read("base/text_encoder_2"), with_projection=True),
    )


CONFIGS = {"tiny": tiny(), "golden": golden_config()}


class Inputs(NamedTuple):
    """What the UNet and IdentityNet take, in this package's layouts."""

    sample: np.ndarray
    timestep: np.ndarray
    text: np.ndarray
    tokens: np.ndarray
    pooled: np.ndarray
    sizes: np.ndarray
    image: np.ndarray

    @property
    def added(self) -> dict[str, torch.Tensor]:
        """diffusers' `added_cond_kwargs`."""
        return {"text_embeds": torch.from_numpy(self.pooled), "time_ids": torch.from_numpy(self.sizes)}


def inputs(config: ModelConfig, size: tuple[int, int], batch: int = 2) -> Inputs:
    """Random inputs for latents of this size; every example has its own (fractional) time and sizes."""
    h, w = size
    width = config.unet.cross_attention_dim
    sizes = np.array([[8 * h, 8 * w, 0, 0, 8 * h, 8 * w], [600, 800, 16, 24, 8 * h, 8 * w], [1024, 768, 0, 5, 512, 512]])
    return Inputs(
        sample=random("sample", batch, h, w, config.unet.in_channels),
        timestep=np.float32([958, 17.25, 501])[:batch],
        text=random("text", batch, 77, width),
        tokens=random("tokens", batch, 16, width),
        pooled=random("pooled", batch, config.unet.pooled_dim),
        sizes=sizes[:batch].astype(np.float32),
        image=np.clip(random("image", batch, 8 * h, 8 * w, 3) * 0.25 + 0.5, 0, 1),
    )


def torch_unet_output(unet: Any, x: Inputs, context: np.ndarray, down: Any = None, mid: Any = None) -> torch.Tensor:
    """diffusers' prediction, [b, c, h, w]."""
    extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return unet(nchw(x.sample), torch.from_numpy(x.timestep), torch.from_numpy(context), added_cond_kwargs=x.added, **extra).sample


def torch_residuals(net: Any, x: Inputs) -> list[torch.Tensor]:
    """diffusers' ControlNet residuals with the identity tokens as context: the skips' ones, then the middle's."""
    down, mid = net(
        nchw(x.sample), torch.from_numpy(x.timestep), torch.from_numpy(x.tokens), nchw(x.image), added_cond_kwargs=x.added, return_dict=False
    )
    return [*down, mid]
