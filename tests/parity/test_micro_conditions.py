"""SDXL's six numbers as diffusers' own ControlNet pipeline hands them to its UNet, run with the smallest possible networks."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, StableDiffusionXLControlNetPipeline, UNet2DConditionModel

from instantid_jax.config import tiny
from instantid_jax.pipeline import check_call

# diffusers 0.42 calls numpy 2 in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHARED: dict[str, Any] = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "cross_attention_dim": 8,
    "attention_head_dim": 1,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLControlNetPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SHARED, up_block_types=("CrossAttnUpBlock2D",))
    net = ControlNetModel(**SHARED, conditioning_embedding_out_channels=(4, 4))
    vae = AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    made = StableDiffusionXLControlNetPipeline(vae, None, None, None, None, unet, net, EulerDiscreteScheduler())  # type: ignore[arg-type]
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"original_size": (20, 30), "crops_coords_top_left": (1, 2), "target_size": (40, 50)},
        {"negative_original_size": (5, 6)},
        {"negative_target_size": (5, 6), "crops_coords_top_left": (3, 4)},
        {"negative_crops_coords_top_left": (5, 6), "original_size": (20, 30)},
        {"negative_original_size": (5, 6), "negative_target_size": (7, 8), "crops_coords_top_left": (3, 4)},
        {"negative_original_size": (5, 6), "negative_target_size": (7, 8), "negative_crops_coords_top_left": (9, 10)},
    ],
    ids=lambda sizes: "-".join(sizes) or "none",
)
def test_sizes_reach_the_network_as_in_diffusers(sizes: dict[str, tuple[int, int]], pipeline: StableDiffusionXLControlNetPipeline) -> None:
    seen: list[np.ndarray] = []

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(keywords["added_cond_kwargs"]["time_ids"].numpy())

    text, pooled = torch.zeros(1, 3, 8), torch.zeros(1, 8)
    hook = pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(
            prompt_embeds=text, negative_prompt_embeds=text, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled,
            image=torch.zeros(1, 3, 64, 96), num_inference_steps=1, guidance_scale=5.0, output_type="latent", **sizes,
        )  # fmt: skip
    finally:
        hook.remove()
    np.testing.assert_array_equal(check_call(tiny(), prompt="x", **sizes).time_ids((64, 96)), seen[0])
