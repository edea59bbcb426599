"""Every setting that decides a shape or a number, as frozen dataclasses.

A model's configuration is read from the ``config.json`` files that are published beside the weights. Fields that this
code does not know, and values that it does not implement, are refused by name: a network that silently ignored a field
would load and give wrong pictures. ``to_json`` and ``from_json`` are exact inverses, so a checkpoint can carry its own
configuration.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from instantid_jax.published import (
    CONTROLNET_FIXED,
    UNET_DEFAULTS,
    UNET_FIXED,
    UP_DEFAULTS,
    ConfigError,
    broadcast,
    build,
    checked,
    read_fields,
    read_unet,
    require,
)

__all__ = [
    "AutoencoderConfig",
    "CLIPTextConfig",
    "ComputeConfig",
    "ConfigError",
    "IdentityNetConfig",
    "ModelConfig",
    "ResamplerConfig",
    "SchedulerConfig",
    "UNetConfig",
    "from_json",
    "portraits",
    "sdxl",
    "tiny",
    "to_json",
]

T = TypeVar("T")


DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """An SDXL-shaped text-to-image UNet (``unet/config.json``). Defaults are SDXL base's."""

    sample_size: int = 128
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    attention_head_dim: tuple[int, ...] = (5, 10, 20)
    """Number of heads a block, in spite of the published name (trap 2 of the published format)."""
    cross_attention_dim: int = 2048
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True
    addition_embed_type: str | None = "text_time"
    addition_time_embed_dim: int | None = 256
    projection_class_embeddings_input_dim: int | None = 2816

    def __post_init__(self) -> None:
        blocks, name = len(self.block_out_channels), type(self).__name__
        for key in ("transformer_layers_per_block", "attention_head_dim"):
            object.__setattr__(self, key, broadcast(getattr(self, key), blocks))
        for key in ("down_block_types", "transformer_layers_per_block", "attention_head_dim"):
            if len(getattr(self, key)) != blocks:
                raise ConfigError(f"{name}: {key} has {len(getattr(self, key))} entries, block_out_channels has {blocks}")
        for block in self.down_block_types:
            require(name, "down_block_types", block, DOWN_BLOCKS)
        require(name, "addition_embed_type", self.addition_embed_type, ("text_time", None))
        for channels, heads, block in zip(self.block_out_channels, self.attention_head_dim, self.down_block_types, strict=True):
            if channels % self.norm_num_groups:
                raise ConfigError(f"{name}: block_out_channels {channels} is not divisible by norm_num_groups {self.norm_num_groups}")
            if block != "DownBlock2D" and channels % heads:
                raise ConfigError(f"{name}: block_out_channels {channels} is not divisible by its {heads} heads")
        if self.addition_embed_type and not (self.addition_time_embed_dim and self.projection_class_embeddings_input_dim):
            needed = "addition_time_embed_dim and projection_class_embeddings_input_dim"
            raise ConfigError(f"{name}: addition_embed_type='text_time' needs {needed}")
        self._check_up_blocks()

    def _check_up_blocks(self) -> None:
        if len(self.up_block_types) != len(self.block_out_channels):
            raise ConfigError(
                f"UNetConfig: up_block_types has {len(self.up_block_types)} entries, block_out_channels has {len(self.block_out_channels)}"
            )
        for block in self.up_block_types:
            require("UNetConfig", "up_block_types", block, UP_BLOCKS)

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding: four times the first block's channels."""
        return 4 * self.block_out_channels[0]

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding that `add_embedding` expects beside the six sizes."""
        if not (self.addition_time_embed_dim and self.projection_class_embeddings_input_dim):
            return 0
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    @property
    def downscale(self) -> int:
        """By how much the deepest block is smaller than the latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def num_skips(self) -> int:
        """How many connections there are between the way down and the way up."""
        return len(self.block_out_channels) * (self.layers_per_block + 1)

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> UNetConfig:
        """Reads ``unet/config.json``. Raises `ConfigError` on any field or value that is not implemented."""
        return cls(**checked(cls, read_unet(cls, published, UNET_FIXED, UNET_DEFAULTS | UP_DEFAULTS)))


@dataclasses.dataclass(frozen=True)
class IdentityNetConfig(UNetConfig):
    """A ControlNet with an SDXL-shaped encoder (``ControlNetModel/config.json``). Defaults are IdentityNet's."""

    out_channels: int = dataclasses.field(default=4, repr=False)
    up_block_types: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    def _check_up_blocks(self) -> None:
        if self.up_block_types:
            raise ConfigError("IdentityNetConfig: a ControlNet has no up blocks; up_block_types must be absent")

    @property
    def conditioning_downscale(self) -> int:
        """Pixels of the control picture to one latent pixel."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> IdentityNetConfig:
        """Reads a ControlNet's ``config.json``. Raises `ConfigError` on any field or value that is not implemented."""
        return cls(**checked(cls, read_unet(cls, published, CONTROLNET_FIXED, UNET_DEFAULTS)))

    @classmethod
    def from_unet(cls, unet: UNetConfig, conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)) -> IdentityNetConfig:
        """The IdentityNet that fits a base UNet: the same encoder, and a conditioning embedding of the given widths."""
        shared = {f.name: getattr(unet, f.name) for f in dataclasses.fields(UNetConfig) if f.name not in ("up_block_types", "out_channels")}
        return cls(**shared, conditioning_embedding_out_channels=conditioning_embedding_out_channels)


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """The Perceiver resampler from face embedding to identity tokens. Defaults are InstantID's."""

    dim: int = 1280
    depth: int = 4
    dim_head: int = 64
    heads: int = 20
    num_queries: int = 16
    embedding_dim: int = 512
    """Width of the face recogniser's vector: 512 for antelopev2, 128 for SFace."""
    output_dim: int = 2048
    ff_mult: int = 4
    kind: str = "perceiver"
    """"perceiver" is InstantID's; "mlp" is the two linear layers of IP-Adapter-FaceID, for ablations."""
    normalize: bool = False
    """Whether the embedding is first brought to length sqrt(embedding_dim). InstantID takes it raw; a zero vector stays zero."""

    def __post_init__(self) -> None:
        require("ResamplerConfig", "kind", self.kind, ("perceiver", "mlp"))


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """AutoencoderKL (``vae/config.json``). Defaults are SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.13025
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ConfigError(f"AutoencoderConfig: block_out_channels {channels} is not divisible by norm_num_groups {self.norm_num_groups}")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ConfigError("AutoencoderConfig: latents_mean and latents_std must be given together")

    @property
    def downscale(self) -> int:
        """Pixels to one latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> AutoencoderConfig:
        """Reads ``vae/config.json``. Raises `ConfigError` on any field or value that is not implemented."""
        published = dict(published)
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for value in published.pop(key, ()):
                require("AutoencoderKL", key, value, (block,))
        return cls(**checked(cls, read_fields(cls, published, {"act_fn": ("silu",)})))


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """A CLIP text tower (``text_encoder/config.json``). Defaults are CLIP ViT-L/14's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 49407
    """The pooled state is taken at the first of these."""
    with_projection: bool = False
    """Whether the tower ends in `text_projection` (CLIPTextModelWithProjection)."""

    def __post_init__(self) -> None:
        require("CLIPTextConfig", "hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"CLIPTextConfig: hidden_size {self.hidden_size} is not divisible by its {self.num_attention_heads} heads")

    @classmethod
    def from_published(cls, published: Mapping[str, Any], *, with_projection: bool) -> CLIPTextConfig:
        """Reads ``text_encoder*/config.json``; whether there is a projection is said by ``model_index.json``."""
        taken: dict[str, Any] = checked(cls, read_fields(cls, published, {})) | {"with_projection": with_projection}
        if taken.get("eos_token_id", 2) == 2:  # SDXL's files carry a placeholder; the tokenizer's last entry is meant
            taken["eos_token_id"] = taken.get("vocab_size", cls.vocab_size) - 1
        return cls(**taken)


_SCHEDULERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule and its discretisation (``scheduler/scheduler_config.json``). Defaults are SDXL base's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    use_karras_sigmas: bool = False
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"
    """Noise level after the last step (Euler, DPM++, UniPC). "zero" is diffusers >= 0.27; "sigma_min" is 0.25's DPM++ and UniPC."""

    def __post_init__(self) -> None:
        name = "SchedulerConfig"
        require(name, "beta_schedule", self.beta_schedule, ("scaled_linear", "linear"))
        require(name, "prediction_type", self.prediction_type, ("epsilon", "v_prediction"))
        require(name, "timestep_spacing", self.timestep_spacing, ("leading", "trailing", "linspace"))
        require(name, "final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(f"{name}: needs 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> SchedulerConfig:
        """Reads ``scheduler_config.json`` of any of diffusers' schedulers: its schedule and spacing, not its solver."""
        require("scheduler", "_class_name", published.get("_class_name", "EulerDiscreteScheduler"), _SCHEDULERS)
        fixed: dict[str, tuple[Any, ...]] = {
            "clip_sample": (False,),
            "interpolation_type": ("linear",),
            "sigma_max": (None,),
            "sigma_min": (None,),
            "thresholding": (False,),
            "timestep_type": ("discrete",),
            "trained_betas": (None,),
            "use_beta_sigmas": (False, None),
            "use_exponential_sigmas": (False, None),
        }
        # Solver settings of diffusers' classes: which solver runs is the sampler's name here, not the file's.
        solver = frozenset(
            [
                "algorithm_type",
                "disable_corrector",
                "dynamic_thresholding_ratio",
                "euler_at_final",
                "flow_shift",
                "lambda_min_clipped",
                "lower_order_final",
                "original_inference_steps",
                "predict_x0",
                "sample_max_value",
                "skip_prk_steps",
                "solver_order",
                "solver_p",
                "solver_type",
                "timestep_scaling",
                "use_flow_sigmas",
                "use_lu_lambdas",
                "variance_type",
            ]
        )
        return cls(**checked(cls, read_fields(cls, published, fixed, solver)))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of a whole InstantID model."""

    unet: UNetConfig = UNetConfig()
    identitynet: IdentityNetConfig = IdentityNetConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    vae: AutoencoderConfig = AutoencoderConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    text_encoder_2: CLIPTextConfig = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        projection_dim=1280,
        with_projection=True,
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    force_zeros_for_empty_prompt: bool = True
    face_analyzer: str = "antelopev2"
    """The face backend whose embeddings the adapter was trained on."""
    keypoint_scale: float = 1.0
    """Size of the drawn keypoints' dots and limbs relative to the published drawing, which suits a thousand pixels."""

    def __post_init__(self) -> None:
        text = self.text_encoder.hidden_size + self.text_encoder_2.hidden_size
        checks = (
            ("the two text towers' widths together", text, "unet.cross_attention_dim", self.unet.cross_attention_dim),
            ("text_encoder_2.projection_dim", self.text_encoder_2.projection_dim, "unet.add_embedding's pooled width", self.unet.pooled_dim),
            ("resampler.output_dim", self.resampler.output_dim, "unet.cross_attention_dim", self.unet.cross_attention_dim),
            ("identitynet.cross_attention_dim", self.identitynet.cross_attention_dim, "resampler.output_dim", self.resampler.output_dim),
            ("vae.latent_channels", self.vae.latent_channels, "unet.in_channels", self.unet.in_channels),
            ("identitynet.conditioning_downscale", self.identitynet.conditioning_downscale, "vae.downscale", self.vae.downscale),
        )
        for left, a, right, b in checks:
            if a != b and not (self.unet.addition_embed_type is None and "projection_dim" in left):
                raise ConfigError(f"ModelConfig: {left} ({a}) must equal {right} ({b})")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the networks are computed; nothing here changes what they mean or how their weights are stored."""

    dtype: str = "float32"
    """Arithmetic of matmuls, convolutions and activations. Softmax, norm statistics, time embedding and samplers stay float32."""
    attention: str = "auto"
    """Backend: "xla", "blocked" (over heads and query blocks; for CPU), "cudnn" (NVIDIA), "splash" (Pallas, TPU), or "auto" by
    platform and shape."""
    unroll: bool = False
    """Whether equal layers are unrolled instead of scanned: longer compiling, the same numbers."""
    remat: str | bool = "none"
    """What the backward pass computes again instead of keeping it, to save memory: "none"; "dots", in transformer blocks all but the
    products with weights; "blocks", whole transformer blocks; "offload", these too, with their inputs waiting in the host's memory (TPU and
    GPU); "full", residual blocks too. True and False mean "blocks" and "none"."""

    def __post_init__(self) -> None:
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "blocks" if self.remat else "none")
        require("ComputeConfig", "remat", self.remat, ("none", "dots", "blocks", "offload", "full"))
        require("ComputeConfig", "dtype", self.dtype, ("float32", "bfloat16", "float16"))
        require("ComputeConfig", "attention", self.attention, ("auto", "xla", "blocked", "cudnn", "splash"))


def to_json(config: Any) -> str:
    """A configuration as JSON text; `from_json` gives an equal object back."""
    return json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True)


def from_json(cls: type[T], text: str) -> T:
    """The inverse of `to_json`. Raises `ConfigError` naming any field that `cls` does not have."""
    return build(cls, json.loads(text), cls.__name__)


def sdxl() -> ModelConfig:
    """InstantID on SDXL base 1.0, as published."""
    return ModelConfig()


def tiny() -> ModelConfig:
    """The real architecture at a size that runs everywhere in seconds; every depth is distinct, as in SDXL."""
    unet = UNetConfig(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=80,
        norm_num_groups=16,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=232,
    )
    return ModelConfig(
        unet=unet,
        identitynet=IdentityNetConfig.from_unet(unet, (16, 32, 48, 64)),
        resampler=ResamplerConfig(dim=64, depth=2, dim_head=16, heads=4, num_queries=16, embedding_dim=128, output_dim=80),
        vae=AutoencoderConfig(block_out_channels=(16, 32, 32, 48), norm_num_groups=16, sample_size=128),
        text_encoder=CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=32),
        text_encoder_2=CLIPTextConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu",
            projection_dim=40,
            with_projection=True,
        ),
        face_analyzer="opencv",
    )


def portraits() -> ModelConfig:
    """The small model that is trained on rendered heads: 64 pixels, latents of 16 x 16 x 8, two text towers of 4,096 tokens."""
    unet = UNetConfig(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 5),
        cross_attention_dim=128,
        norm_num_groups=16,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=160,
    )
    tower = CLIPTextConfig(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, eos_token_id=4095)
    return ModelConfig(
        unet=unet,
        identitynet=IdentityNetConfig.from_unet(unet, (16, 24, 48)),
        resampler=ResamplerConfig(dim=128, depth=2, dim_head=32, heads=4, num_queries=16, embedding_dim=128, output_dim=128),
        vae=AutoencoderConfig(latent_channels=8, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=64),
        text_encoder=dataclasses.replace(tower, projection_dim=64),
        text_encoder_2=dataclasses.replace(tower, hidden_act="gelu", projection_dim=64, with_projection=True),
        scheduler=SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0),
        force_zeros_for_empty_prompt=False,
        face_analyzer="opencv",
        keypoint_scale=0.15,
    )
