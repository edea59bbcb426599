"""The tables against PyTorch's own classes: the names and shapes of every full-size network, without weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from convert_weights.readers import table_of
from convert_weights.rules import plan
from instantid_jax.config import CLIPTextConfig, IdentityNetConfig, sdxl
from instantid_jax.models import build_networks

SDXL = sdxl()


def shared(config: IdentityNetConfig | object) -> dict[str, object]:
    names = (
        "block_out_channels",
        "down_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
    )
    more = ("use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "norm_num_groups")
    return {name: getattr(config, name) for name in names + more}


def clip(config: CLIPTextConfig) -> TorchCLIPTextConfig:
    values = dataclasses.asdict(config)
    values.pop("with_projection")
    return TorchCLIPTextConfig(**values)


def torch_network(name: str) -> torch.nn.Module:
    """PyTorch's network of SDXL's sizes, on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        match name:
            case "unet":
                return UNet2DConditionModel(up_block_types=SDXL.unet.up_block_types, **shared(SDXL.unet))
            case "identitynet":
                return ControlNetModel(conditioning_embedding_out_channels=(16, 32, 96, 256), **shared(SDXL.identitynet))
            case "vae":
                blocks = len(SDXL.vae.block_out_channels)
                kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
                return AutoencoderKL(block_out_channels=SDXL.vae.block_out_channels, layers_per_block=2, latent_channels=4, **kinds)
            case "text_encoder":
                return CLIPTextModel(clip(SDXL.text_encoder))
            case _:
                return CLIPTextModelWithProjection(clip(SDXL.text_encoder_2))


@pytest.mark.parametrize("name", ["unet", "identitynet", "vae", "text_encoder", "text_encoder_2"])
def test_names_and_shapes_are_pytorch_s(name: str) -> None:
    table = table_of(name, SDXL)
    theirs = {table.spelling(key): tuple(x.shape) for key, x in torch_network(name).state_dict().items() if not table.reason_to_ignore(key)}
    ours = {a.source: a.source_shapes()[0] for a in plan(table, build_networks(SDXL)[name].disk_shapes())}
    assert ours == theirs


def test_adapter_numbers_are_the_places_among_diffusers_attention_processors() -> None:
    network = torch_network("unet")
    assert isinstance(network, UNet2DConditionModel)
    table = table_of("adapter", SDXL)
    places = [key.removesuffix(".processor") for key in network.attn_processors]
    assert len(places) == 140
    modules = dict(network.named_modules())
    for number, place in enumerate(places):
        found = table.to_target(f"{number}.to_k_ip.weight", 2)
        if place.endswith("attn1"):
            assert found is None
        else:
            module = modules[place]
            assert isinstance(module, Attention)
            assert found is not None and found[0] == f"{place.replace('.', '/')}/to_k_ip/kernel"


def test_the_golden_configurations_name_the_golden_tensors() -> None:
    """The tiny case was written by PyTorch's own classes, so its list of names is a second oracle."""
    golden = Path(__file__).parents[1] / "golden/dev"
    names = json.loads((golden / "shapes.json").read_text())
    published = json.loads((golden / "base/unet/config.json").read_text())
    network = UNet2DConditionModel.from_config(published)
    assert {key: list(x.shape) for key, x in network.state_dict().items()} == names["unet"]
