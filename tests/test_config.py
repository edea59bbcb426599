"""Published configuration files are read or refused by name; JSON is exact."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instantid_jax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    ComputeConfig,
    ConfigError,
    IdentityNetConfig,
    ModelConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
    from_json,
    sdxl,
    tiny,
    to_json,
)

DEV = Path(__file__).parent / "golden" / "dev"

# `unet/config.json` of SDXL base 1.0, with the fields that later diffusers versions add.
SDXL_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def read(part: str) -> Any:
    return json.loads((DEV / part).read_text())


def test_published_sdxl_unet_is_the_default() -> None:
    assert UNetConfig.from_published(SDXL_UNET) == UNetConfig()
    assert UNetConfig().time_embed_dim == 1280
    assert UNetConfig().pooled_dim == 1280
    assert UNetConfig().downscale == 4


def test_identitynet_is_the_encoder_of_its_unet() -> None:
    published = {k: v for k, v in SDXL_UNET.items() if k not in ("up_block_types", "out_channels", "conv_out_kernel", "center_input_sample")}
    published |= {"_class_name": "ControlNetModel", "conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256]}
    published |= {"controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False}
    assert IdentityNetConfig.from_published(published) == IdentityNetConfig() == IdentityNetConfig.from_unet(UNetConfig())
    assert IdentityNetConfig().conditioning_downscale == 8


def test_published_files_of_the_golden_case_are_read() -> None:
    unet = UNetConfig.from_published(read("base/unet/config.json"))
    assert (unet.block_out_channels, unet.transformer_layers_per_block, unet.attention_head_dim) == ((32, 64), (1, 2), (2, 4))
    assert IdentityNetConfig.from_published(read("instantid/ControlNetModel/config.json")).conditioning_embedding_out_channels == (16, 32, 48, 64)
    vae = AutoencoderConfig.from_published(read("base/vae/config.json"))
    assert (vae.scaling_factor, vae.downscale) == (0.13025, 8)
    towers = [CLIPTextConfig.from_published(read(f"base/{n}/config.json"), with_projection=n[-1] == "2") for n in ("text_encoder", "text_encoder_2")]
    assert [(t.hidden_size, t.hidden_act, t.with_projection) for t in towers] == [(32, "quick_gelu", False), (48, "gelu", True)]
    scheduler = SchedulerConfig.from_published(read("base/scheduler/scheduler_config.json"))
    assert (scheduler.timestep_spacing, scheduler.steps_offset) == ("leading", 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_epz": 1e-5}, r"UNet2DConditionModel: unknown field 'norm_epz' = 1e-05; did you mean 'norm_eps'"),
        ({"zzz": 1}, r"UNet2DConditionModel: unknown field 'zzz' = 1$"),
        ({"act_fn": "gelu"}, r"UNet2DConditionModel: act_fn='gelu' is not supported; supported: 'silu'"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, r"encoder_hid_dim_type='ip_image_proj' is not supported"),
        ({"resnet_time_scale_shift": "scale_shift"}, r"resnet_time_scale_shift='scale_shift' is not supported"),
        ({"addition_embed_type": "image"}, r"addition_embed_type='image' is not supported; supported: 'text_time', None"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "KDownBlock2D"]}, r"down_block_types='KDownBlock2D' is not supported"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, r"up_block_types has 2 entries, block_out_channels has 3"),
        ({"layers_per_block": [2, 2, 3]}, r"layers_per_block=\[2, 2, 3\]: only equal numbers are supported"),
        ({"attention_head_dim": [5, 10]}, r"attention_head_dim has 2 entries, block_out_channels has 3"),
        ({"attention_head_dim": [5, 10, 21]}, r"block_out_channels 1280 is not divisible by its 21 heads"),
        ({"norm_num_groups": 7}, r"block_out_channels 320 is not divisible by norm_num_groups 7"),
        ({"addition_time_embed_dim": None}, r"addition_embed_type='text_time' needs addition_time_embed_dim"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_published(SDXL_UNET | changed)


def test_scalars_are_one_entry_a_block() -> None:
    config = UNetConfig.from_published(SDXL_UNET | {"attention_head_dim": 10, "transformer_layers_per_block": 1, "layers_per_block": [2, 2, 2]})
    assert (config.attention_head_dim, config.transformer_layers_per_block, config.layers_per_block) == ((10, 10, 10), (1, 1, 1), 2)


def test_num_attention_heads_wins_over_its_misnamed_twin() -> None:
    assert UNetConfig.from_published(SDXL_UNET | {"num_attention_heads": [4, 8, 16]}).attention_head_dim == (4, 8, 16)


def test_controlnet_refuses_its_own_unknowns() -> None:
    published = read("instantid/ControlNetModel/config.json")
    with pytest.raises(ConfigError, match="controlnet_conditioning_channel_order='bgr' is not supported; supported: 'rgb'"):
        IdentityNetConfig.from_published(published | {"controlnet_conditioning_channel_order": "bgr"})
    with pytest.raises(ConfigError, match="global_pool_conditions=True is not supported"):
        IdentityNetConfig.from_published(published | {"global_pool_conditions": True})
    with pytest.raises(ConfigError, match="up_block_types must be absent"):
        IdentityNetConfig.from_published(published | {"up_block_types": ["UpBlock2D", "UpBlock2D"]})


def test_autoencoder_refusals() -> None:
    published = read("base/vae/config.json")
    with pytest.raises(ConfigError, match="AutoencoderKL: up_block_types='AttnUpDecoderBlock2D' is not supported"):
        AutoencoderConfig.from_published(published | {"up_block_types": ["AttnUpDecoderBlock2D"]})
    with pytest.raises(ConfigError, match="latents_mean and latents_std must be given together"):
        AutoencoderConfig.from_published(published | {"latents_mean": [0.0, 0.0, 0.0, 0.0]})
    with pytest.raises(ConfigError, match=r"unknown field 'scaling_facto' = 1.0; did you mean 'scaling_factor'"):
        AutoencoderConfig.from_published(published | {"scaling_facto": 1.0})


@pytest.mark.parametrize(("published", "expected"), [(2, 49407), (49407, 49407), (7, 7)])
def test_end_of_text_token(published: int, expected: int) -> None:
    """SDXL's text configurations say 2, a placeholder: the tokenizer's end-of-text is the last entry of the vocabulary."""
    config = CLIPTextConfig.from_published(read("base/text_encoder/config.json") | {"eos_token_id": published}, with_projection=False)
    assert config.eos_token_id == expected


def test_text_tower_refusals() -> None:
    published = read("base/text_encoder/config.json")
    with pytest.raises(ConfigError, match="hidden_act='relu' is not supported; supported: 'quick_gelu', 'gelu'"):
        CLIPTextConfig.from_published(published | {"hidden_act": "relu"}, with_projection=False)
    with pytest.raises(ConfigError, match="hidden_size 32 is not divisible by its 5 heads"):
        CLIPTextConfig.from_published(published | {"num_attention_heads": 5}, with_projection=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type='sample' is not supported; supported: 'epsilon', 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2' is not supported"),
        ({"timestep_spacing": "log"}, "timestep_spacing='log' is not supported"),
        ({"clip_sample": True}, "clip_sample=True is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name='FlowMatchEulerDiscreteScheduler' is not supported"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "needs 0 < beta_start <= beta_end < 1"),
        ({"step_offset": 1}, "unknown field 'step_offset' = 1; did you mean 'steps_offset'"),
    ],
)
def test_scheduler_refusals(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig.from_published(read("base/scheduler/scheduler_config.json") | changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "text_encoder",
            CLIPTextConfig(hidden_size=64, num_attention_heads=4),
            r"towers' widths together \(112\) must equal unet.cross_attention_dim",
        ),
        ("resampler", ResamplerConfig(output_dim=2048), r"resampler.output_dim \(2048\) must equal unet.cross_attention_dim \(80\)"),
        ("vae", AutoencoderConfig(latent_channels=16), r"vae.latent_channels \(16\) must equal unet.in_channels \(4\)"),
        ("vae", AutoencoderConfig(block_out_channels=(32, 64)), r"conditioning_downscale \(8\) must equal vae.downscale \(2\)"),
        ("identitynet", dataclasses.replace(tiny().identitynet, cross_attention_dim=64), r"identitynet.cross_attention_dim \(64\) must equal"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny(), **{field: value})


@pytest.mark.parametrize(
    "config", [sdxl(), tiny(), tiny().unet, tiny().identitynet, ResamplerConfig(), AutoencoderConfig(latents_mean=(0.5,), latents_std=(2.0,))]
)
def test_json_round_trip(config: Any) -> None:
    text = to_json(config)
    again = from_json(type(config), text)
    assert again == config
    assert hash(again) == hash(config)
    assert to_json(again) == text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unet", "sample_sizes"), 1, r"ModelConfig.unet: unknown field 'sample_sizes'; did you mean 'sample_size'\?"),
        (("resampler", "dim"), "1280", r"ModelConfig.resampler.dim: '1280' is not a <class 'int'>"),
        (("resampler", "dim"), None, r"ModelConfig.resampler.dim: None is not a <class 'int'>"),
        (("resampler", "dim"), True, r"ModelConfig.resampler.dim: True is not a <class 'int'>"),
        (("unet", "block_out_channels"), [32, "64", 96], r"ModelConfig.unet.block_out_channels\[1\]: '64' is not a"),
        (("vae",), [1], r"ModelConfig.vae: expected an object, got \[1\]"),
    ],
)
def test_json_refusals_say_where(path: tuple[str, ...], value: Any, message: str) -> None:
    values = json.loads(to_json(tiny()))
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        from_json(ModelConfig, json.dumps(values))


def test_json_takes_a_whole_number_for_a_fraction() -> None:
    values = json.loads(to_json(AutoencoderConfig())) | {"scaling_factor": 1}
    assert from_json(AutoencoderConfig, json.dumps(values)).scaling_factor == 1.0


@pytest.mark.parametrize(("field", "value"), [("dtype", "fp16"), ("attention", "flash")])
def test_compute_settings_are_checked(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"ComputeConfig: {field}='{value}' is not supported; supported: "):
        ComputeConfig(**{field: value})


def test_every_depth_of_the_tiny_preset_is_distinct() -> None:
    config = tiny()
    assert len(set(config.unet.transformer_layers_per_block)) == len(config.unet.block_out_channels) == len(set(config.unet.block_out_channels))
    assert config.text_encoder.num_hidden_layers != config.text_encoder_2.num_hidden_layers


def published_files() -> dict[str, tuple[Callable[[dict], Any], dict]]:
    """Published dicts with every field, and what reads each."""
    unet = dataclasses.asdict(UNetConfig()) | {"act_fn": "silu", "mid_block_scale_factor": 1}
    net = {k: v for k, v in dataclasses.asdict(IdentityNetConfig()).items() if k not in ("up_block_types", "out_channels")}
    text, vae, schedule = (dataclasses.asdict(c()) for c in (CLIPTextConfig, AutoencoderConfig, SchedulerConfig))
    text.pop("with_projection")
    return {
        "unet": (UNetConfig.from_published, unet),
        "identitynet": (IdentityNetConfig.from_published, net),
        "vae": (AutoencoderConfig.from_published, vae),
        "text": (lambda d: CLIPTextConfig.from_published(d, with_projection=False), text),
        "scheduler": (SchedulerConfig.from_published, schedule),
    }


@pytest.mark.parametrize("kind", ["unet", "identitynet", "vae", "text", "scheduler"])
def test_a_published_value_is_read_or_refused_by_name_whatever_it_is(kind: str) -> None:
    read, good = published_files()[kind]
    read(good)
    for field in good:
        for value in (None, "x", -1, 0, 1.5, True, float("nan"), float("inf"), [], [0], ["x"], [None], {}, 10**30):
            try:
                config = read(good | {field: value})
            except ConfigError as error:
                assert ": " in str(error), (field, value)
            else:
                assert from_json(type(config), to_json(config)) == config, (field, value)
