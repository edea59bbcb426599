"""Networks of Stable Diffusion 1.5's shape against diffusers, on equal random weights in float32: largest relative error 1e-4.

Four resolutions, none of them twice as deep as another, convolutions around the transformers, no pooled text and no sizes. The
configuration is read from the fields that the published file has; those that it lacks are diffusers' defaults.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import Flat, error, load, nchw, nhwc, random, run, torch_controlnet, torch_unet, weights

from instantid_jax.config import AutoencoderConfig, ComputeConfig, IdentityNetConfig, UNetConfig
from instantid_jax.models.adapter import Adapter
from instantid_jax.models.encoder import IdentityContext
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.models.network import Network
from instantid_jax.models.unet import UNet

PUBLISHED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL = {"block_out_channels": [32, 64, 96, 96], "norm_num_groups": 16, "cross_attention_dim": 48}
SIZES = [pytest.param(SMALL, (16, 24), id="small"), pytest.param({}, (64, 64), id="true", marks=pytest.mark.slow)]


def network(kind: Any, config: Any) -> tuple[Network, Flat]:
    made = Network(kind, config, ComputeConfig())
    return made, weights(made, kind.__name__.lower())


@pytest.mark.parametrize(("changes", "size"), SIZES)
def test_unet(changes: dict[str, Any], size: tuple[int, int]) -> None:
    config = UNetConfig.from_published(PUBLISHED | changes)
    assert config.attention_head_dim == (8, 8, 8, 8) and config.transformer_layers_per_block == (1, 1, 1, 1)
    assert not config.use_linear_projection and config.addition_embed_type is None
    made, flat = network(UNet, config)
    sample, text, time = random("sample", 2, *size, 4), random("text", 2, 77, config.cross_attention_dim), np.float32([958, 17.25])
    ours = run(made, flat, lambda m, x: m(x[0], x[1], m.project_context(x[2]), None), (sample, time, text))
    theirs = load(torch_unet(config), flat)(nchw(sample), torch.from_numpy(time), torch.from_numpy(text)).sample
    assert error(ours, nhwc(theirs)) <= 1e-4


def test_identitynet() -> None:
    unet = UNetConfig.from_published(PUBLISHED | SMALL)
    config = IdentityNetConfig.from_unet(unet, (16, 32, 48, 64))
    without = {key: value for key, value in (PUBLISHED | SMALL).items() if key not in ("up_block_types", "out_channels", "sample_size")}
    widths = {"conditioning_embedding_out_channels": [16, 32, 48, 64]}
    published = IdentityNetConfig.from_published(without | widths | {"_class_name": "ControlNetModel"})
    assert {k: v for k, v in vars(published).items() if k != "sample_size"} == {k: v for k, v in vars(config).items() if k != "sample_size"}
    made, flat = network(IdentityNet, config)
    sample, tokens, image = random("sample", 2, 16, 24, 4), random("tokens", 2, 16, 48), random("image", 2, 128, 192, 3)
    time = np.float32([958, 17.25])
    ours = run(made, flat, lambda m, x: m(x[0], x[1], m.project_context(x[2]), None, m.embed_condition(x[3])), (sample, time, tokens, image))
    down, mid = load(torch_controlnet(config), flat)(nchw(sample), torch.from_numpy(time), torch.from_numpy(tokens), nchw(image), return_dict=False)
    assert len(ours.down) == 12
    for mine, reference in zip([*ours.down, ours.mid], [*down, mid], strict=True):
        assert error(mine, nhwc(reference)) <= 1e-4


def test_sixteen_sites_take_the_identity() -> None:
    config = UNetConfig.from_published(PUBLISHED | SMALL)
    adapter, flat = network(Adapter, config)
    assert len({path.rsplit("/to_", 1)[0] for path in flat}) == 16
    assert AutoencoderConfig().scaling_factor == 0.13025  # SDXL's: of another VAE the file says its own
    made, parameters = network(UNet, config)
    sample, text, tokens = random("sample", 1, 16, 16, 4), random("text", 1, 77, 48), random("tokens", 1, 16, 48)

    def drawn(m: Any, x: Any) -> Any:
        identity = IdentityContext(adapter.bind(adapter.from_disk(flat))(x[2]), jnp.float32(x[3]))
        return m(x[0], jnp.float32(500), m.project_context(x[1]), None, identity=identity)

    plain, with_identity = (np.asarray(run(made, parameters, drawn, (sample, text, tokens, s))) for s in (0.0, 1.0))
    assert np.abs(plain - with_identity).max() > 1e-2 * np.abs(plain).max()
