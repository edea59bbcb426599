"""What the tests of training share: the smallest model of the real architecture, records with cached latents, a recipe."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instantid_jax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    IdentityNetConfig,
    ModelConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
)
from instantid_jax.data.loader import LoaderConfig
from instantid_jax.data.record import CachedLatents, Record, View
from instantid_jax.data.sources import MemorySource
from instantid_jax.face.align import ARCFACE_TEMPLATE
from instantid_jax.training.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

SIDE = 16  # pixels; latents are 8 x 8 x 4


def model(prediction_type: str = "epsilon") -> ModelConfig:
    """Two levels of 32 channels, one layer each, attention on the lower one; text towers of 514 tokens."""
    unet = UNetConfig(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 2),
        cross_attention_dim=32,
        norm_num_groups=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    tower = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16, eos_token_id=513
    )
    return ModelConfig(
        unet=unet,
        identitynet=IdentityNetConfig.from_unet(unet, (8, 8)),
        resampler=ResamplerConfig(dim=16, depth=1, dim_head=8, heads=2, num_queries=4, embedding_dim=16, output_dim=32),
        vae=AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=SIDE, mid_block_add_attention=False),
        text_encoder=tower,
        text_encoder_2=dataclasses.replace(tower, hidden_act="gelu", with_projection=True),
        scheduler=SchedulerConfig(prediction_type=prediction_type),
        force_zeros_for_empty_prompt=False,
        face_analyzer="opencv",
    )


def record(i: int, *, latents: bool = True) -> Record:
    """Record number i of a person who has three; embedding and latents follow from the person, so there is something to learn."""
    person, rng = i // 3, np.random.default_rng(i)
    face = np.random.default_rng(1000 + person).normal(size=16).astype(np.float32)
    fields: dict[str, Any] = {}
    image = b""
    if latents:
        tint = np.tile(face[:4], (SIDE // 2, SIDE // 2, 1)).astype(np.float32)
        mean = (tint + 0.1 * rng.normal(size=tint.shape)).astype(np.float32)
        fields["latents"] = CachedLatents(mean, np.full_like(mean, -6), View(SIDE, SIDE, 0, 0, SIDE, SIDE), "vae")
    else:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
        image = buffer.getvalue()
    shift = rng.uniform(0, 4, 2)
    return Record(
        key=f"record-{i:05d}",
        image=image,
        size=(SIDE, SIDE),
        keypoints=(ARCFACE_TEMPLATE / 112 * 10 + shift).astype(np.float32),
        face_box=np.array([*shift, *(shift + 10)], np.float32),
        embeddings=face[None],
        embedder="opencv",
        caption=f"person number {i}",
        identity=f"person {person}",
        **fields,
    )


def source(count: int = 24, *, latents: bool = True) -> MemorySource:
    """`count` records in memory."""
    return MemorySource([record(i, latents=latents) for i in range(count)])


def recipe(out: Path | str, **fields: Any) -> TrainConfig:
    """A short run of the third stage; fields of parts are named "loss__face_weight"."""
    own = {name: value for name, value in fields.items() if "__" not in name}
    config = TrainConfig(
        model=own.pop("model", None) or model(),
        steps=own.pop("steps", 4),
        out=str(out),
        loader=LoaderConfig(global_batch=8, resolution=SIDE, cached_latents=True, keypoint_scale=0.15, num_threads=0),
        init=InitConfig(from_base=("identitynet", "adapter"), random=("resampler", "unet", "vae", "text_encoder", "text_encoder_2")),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema=0.99),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1),
        validation=ValidationConfig(every=None, batches=1, samples=2, sample_steps=2),
    )
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if "__" in name:
            part, field = name.split("__")
            parts.setdefault(part, {})[field] = value
    changed = {part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()}
    return dataclasses.replace(config, **own, **changed)
