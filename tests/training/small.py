"""What the tests of training share: the smallest model of the real architecture, records with cached latents, a recipe."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instantid_jax.checkpoint import save_weights
from instantid_jax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    IdentityNetConfig,
    ModelConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
    to_json,
)
from instantid_jax.data.loader import LoaderConfig
from instantid_jax.data.record import CachedLatents, Record, View
from instantid_jax.data.sources import MemorySource
from instantid_jax.face.align import ARCFACE_TEMPLATE
from instantid_jax.models.recognizer import RecognizerConfig
from instantid_jax.paths import Tree, map_paths
from instantid_jax.training.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
)
from instantid_jax.training.networks import training_networks

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


def draw(abstract: Tree, seed: int = 0) -> Tree:
    """Weights of the usual size for shapes: drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def one(path: str, leaf: Any) -> np.ndarray:
        name, fan_in = path.rsplit("/", 1)[-1], max(int(np.prod(leaf.shape[:-1])), 1)
        deviation = 0.02 if name in ("scale", "bias") else fan_in**-0.5
        return (deviation * rng.normal(size=leaf.shape) + (name == "scale")).astype(np.float32)

    return map_paths(one, abstract)


def write_weights(folder: Path, config: TrainConfig) -> Path:
    """A folder of starting weights with every network of a recipe."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config.model))
    for number, (name, network) in enumerate(training_networks(config).items()):
        save_weights(folder / name, network.to_disk(draw(network.abstract, number)))
    return folder


def recipe(out: Path | str, weights: Path | str | None = None, **fields: Any) -> TrainConfig:
    """A short run of the third stage from `weights`; fields of parts are named "loss__face_weight"."""
    own = {name: value for name, value in fields.items() if "__" not in name}
    config = TrainConfig(
        model=own.pop("model", None) or model(),
        steps=own.pop("steps", 4),
        out=str(out),
        loader=LoaderConfig(global_batch=8, resolution=SIDE, cached_latents=True, num_threads=0),
        stage=own.pop("stage", StageConfig()),
        init=own.pop("init", None) or InitConfig(weights=str(weights or out)),
        recognizer=RecognizerConfig(widths=(16,), norm_num_groups=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema=0.99),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1),
        validation=ValidationConfig(every=None, batches=1, samples=2, sample_steps=2),
    )
    return changed(config, **{name: value for name, value in fields.items() if "__" in name} | own)


def quick(out: Path | str, weights: Path | str, **fields: Any) -> TrainConfig:
    """The same for the recogniser of latents, one residual block: its step compiles in a second, and all else is the real trainer."""
    stage = StageConfig(objective="recognize", trainable=(r"^recognizer/",))
    init = InitConfig(weights=str(weights), from_base=(), random=("recognizer",))
    return recipe(out, **{"stage": stage, "init": init, "loader__keypoint_style": "none", **fields})


def adapter(out: Path | str, weights: Path | str, **fields: Any) -> TrainConfig:
    """The image adapter alone, on a UNet of one level."""
    whole = model()
    unet = dataclasses.replace(
        whole.unet,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        transformer_layers_per_block=(2,),
        attention_head_dim=(2,),
    )
    one_level = dataclasses.replace(whole, unet=unet, identitynet=IdentityNetConfig.from_unet(unet, (8, 8)))
    stage = StageConfig(identitynet=False, trainable=(r"^adapter/", r"^resampler/"))
    init = InitConfig(weights=str(weights), from_base=("adapter",))
    return recipe(out, **{"model": one_level, "stage": stage, "init": init, **fields})


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    """The configuration with other fields; those of parts are named "loss__face_weight"."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if "__" in name:
            part, field = name.split("__")
            parts.setdefault(part, {})[field] = value
    own: dict[str, Any] = {name: value for name, value in fields.items() if "__" not in name}
    return dataclasses.replace(config, **own, **{part: dataclasses.replace(getattr(config, part), **values) for part, values in parts.items()})


PARTS = {"whole": recipe, "quick": quick, "adapter": adapter}
