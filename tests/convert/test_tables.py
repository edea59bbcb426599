"""The tables alone: published names to parameters and back, one to one, for the full-size networks, without weights."""

import dataclasses
import math

import numpy as np
import pytest

from convert_weights.readers import table_of
from convert_weights.rules import CONV, KEEP, LINEAR, POINTWISE, Layout, MappingError, Row, Table, account, join, plan, thirds
from convert_weights.tables import diffusers, single_file
from instantid_jax.config import sdxl
from instantid_jax.models import build_networks

SDXL = sdxl()
SHAPES = {name: network.disk_shapes() for name, network in build_networks(SDXL).items()}
# Tensors and parameters of the published files.
TOTALS = {
    "unet": (1680, 2_567_463_684),
    "identitynet": (844, 1_251_014_160),
    "resampler": (51, 81_978_624),
    "adapter": (140, 340_787_200),
    "vae": (248, 83_653_863),
    "text_encoder": (196, 123_060_480),
    "text_encoder_2": (517, 694_659_840),
}
RENAMES = {
    "unet": single_file.unet(SDXL.unet),
    "vae": single_file.vae(SDXL.vae),
    "text_encoder": single_file.TEXT_ENCODER,
    "text_encoder_2": single_file.TEXT_ENCODER_2,
}


@dataclasses.dataclass
class Shaped:
    """A tensor of which only the shape is known."""

    shape: tuple[int, ...]


def published(name: str) -> dict[str, tuple[int, ...]]:
    return {a.source: a.source_shapes()[0] for a in plan(table_of(name, SDXL), SHAPES[name])}


@pytest.mark.parametrize("name", TOTALS)
def test_full_size_names_map_one_to_one_both_ways(name: str) -> None:
    table = table_of(name, SDXL)
    assignments = plan(table, SHAPES[name])
    assert (len(assignments), sum(math.prod(a.shape) for a in assignments)) == TOTALS[name]
    assert len({a.source for a in assignments}) == len({a.target for a in assignments}) == TOTALS[name][0]
    for a in assignments:
        assert table.to_target(a.source, len(a.shape)) == (a.target, a.layout)
        assert math.prod(a.source_shapes()[0]) == math.prod(a.shape)
    assert account(name, assignments, {n: Shaped(s) for n, s in published(name).items()}, table).ignored == {}


@pytest.mark.parametrize("name", RENAMES)
def test_single_file_names_map_one_to_one_both_ways(name: str) -> None:
    assignments = plan(table_of(name, SDXL), SHAPES[name], RENAMES[name])
    sources: dict[str, list[str]] = {}
    for a in assignments:
        sources.setdefault(a.source, []).append(a.published)
        if a.rename.part is None:
            assert RENAMES[name].to_target(a.source, 0) == (a.published, a.rename)
    shared = [names for names in sources.values() if len(names) > 1]
    assert all(len(names) == 3 for names in shared)
    assert len(shared) == (64 if name == "text_encoder_2" else 0)  # in_proj of 32 layers: weight and bias
    assert len(sources) + 2 * len(shared) == TOTALS[name][0]


def test_parameters_lie_where_they_should() -> None:
    groups = {
        "conv_in": (2, 11_840),
        "time_embedding": (4, 2_050_560),
        "add_embedding": (4, 5_245_440),
        "down_blocks.0": (22, 5_432_000),
        "down_blocks.1": (116, 60_105_600),
        "down_blocks.2": (434, 757_404_160),
        "mid_block.resnets": (20, 62_277_120),
        "mid_block.attentions": (206, 350_840_320),
        "up_blocks.0": (656, 1_206_568_960),
        "up_blocks.1": (176, 106_343_680),
        "up_blocks.2": (36, 11_171_840),
        "conv_norm_out": (2, 640),
        "conv_out": (2, 11_524),
    }
    names = published("unet")
    for prefix, (tensors, parameters) in groups.items():
        shapes = [shape for name, shape in names.items() if name.startswith(prefix + ".")]
        assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, parameters), prefix
    control = published("identitynet")
    for prefix, parameters in (("controlnet_cond_embedding", 1_086_480), ("controlnet_down_blocks", 4_920_960), ("controlnet_mid_block", 1_639_680)):
        assert sum(math.prod(s) for n, s in control.items() if n.startswith(prefix)) == parameters


def test_adapter_numbers() -> None:
    names = published("adapter")
    numbers = sorted({int(name.split(".")[0]) for name in names})
    assert numbers == list(range(1, 140, 2))
    narrow = {1, 3, 5, 7, *range(109, 120, 2)}
    for n in numbers:
        for projection in ("to_k_ip", "to_v_ip"):
            assert names[f"{n}.{projection}.weight"] == (640 if n in narrow else 1280, 2048)
    table = table_of("adapter", SDXL)
    for n, path in ((1, "down_blocks/1/attentions/0/transformer_blocks/0"), (49, "up_blocks/0/attentions/0/transformer_blocks/0")):
        assert table.to_target(f"{n}.to_k_ip.weight", 2) == (f"{path}/attn2/to_k_ip/kernel", LINEAR)
    assert table.to_target("139.to_v_ip.weight", 2) == ("mid_block/attentions/0/transformer_blocks/9/attn2/to_v_ip/kernel", LINEAR)


@pytest.mark.parametrize(
    ("source", "published_name"),
    [
        ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("input_blocks.4.0.skip_connection.bias", "down_blocks.1.resnets.0.conv_shortcut.bias"),
        ("input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.bias", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0.bias"),
        ("middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
        ("output_blocks.2.2.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.5.1.norm.weight", "up_blocks.1.attentions.2.norm.weight"),
        ("output_blocks.8.0.emb_layers.1.weight", "up_blocks.2.resnets.2.time_emb_proj.weight"),
        ("label_emb.0.2.weight", "add_embedding.linear_2.weight"),
        ("out.0.bias", "conv_norm_out.bias"),
    ],
)
def test_single_file_unet_names(source: str, published_name: str) -> None:
    assert RENAMES["unet"].to_target(single_file.UNET + source, 0) == (published_name, KEEP)


@pytest.mark.parametrize("layout", [KEEP, LINEAR, CONV, POINTWISE])
def test_layouts_are_undone_exactly(layout: Layout) -> None:
    shape = {LINEAR: (3, 5), CONV: (4, 3, 1, 2), POINTWISE: (4, 6, 1, 1)}.get(layout, (2, 3))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    ours = layout.forward(x)
    assert np.shares_memory(ours, x)
    back = layout.inverse(ours)
    assert back.shape == shape and back.tobytes() == x.tobytes()
    assert layout.source_shapes(ours.shape)[0] == shape


def test_conv_and_linear_layouts() -> None:
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # torch: out, in, height, width
    assert CONV.forward(x).shape == (4, 5, 3, 2)
    assert CONV.forward(x)[1, 2, 0, 1] == x[1, 0, 1, 2]
    assert LINEAR.forward(x[0, 0])[2, 3] == x[0, 0, 3, 2]


def test_parts_are_joined_again() -> None:
    table = Table([Row("in_proj", "{name}/kernel", LINEAR)])
    whole = np.arange(18).reshape(6, 3)
    assignments = [dataclasses.replace(a, rename=thirds(k)) for k, a in enumerate(plan(table, {f"{n}/kernel": (3, 2) for n in "qkv"}))]
    arrays = {a.target: a.forward(whole) for a in assignments}
    assert np.array_equal(arrays["k/kernel"], whole[2:4].T)
    assert np.array_equal(join(assignments[::-1], arrays)["in_proj"], whole)
    fulfilled = account("net", assignments, {"in_proj": Shaped((6, 3))}, table)
    assert fulfilled.names == {"in_proj": "in_proj"}
    with pytest.raises(MappingError, match="in_proj fills 2 parameters"):
        account("net", assignments[:2], {"in_proj": Shaped((6, 3))}, table)


def test_one_error_lists_everything() -> None:
    names: dict[str, Shaped] = {n: Shaped(s) for n, s in published("vae").items()}
    del names["encoder.conv_in.weight"]
    names["encoder.conv_inn.weight"] = Shaped((128, 3, 3, 3))
    names["decoder.conv_out.bias"] = Shaped((4,))
    names["completely.else"] = Shaped(())
    with pytest.raises(MappingError) as error:
        account("vae", plan(diffusers.DIFFUSERS, SHAPES["vae"]), names, diffusers.DIFFUSERS)
    text = str(error.value)
    assert "missing (1): encoder.conv_in.weight (nearest: encoder.conv_inn.weight)" in text
    assert "unused (2): completely.else; encoder.conv_inn.weight (nearest: encoder.conv_in.weight)" in text
    assert "mis-shaped (1): decoder.conv_out.bias is [4] where [3] is needed" in text


def test_old_attention_names_are_understood_but_not_beside_new_ones() -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names: dict[str, str] = {}
    for name in published("vae"):
        spelling = name
        for new, former in old.items():
            spelling = spelling.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        names[spelling] = name
    assert sum(a != b for a, b in names.items()) == 16
    shapes = {old_name: Shaped(published("vae")[name]) for old_name, name in names.items()}
    fulfilled = account("vae", plan(diffusers.DIFFUSERS, SHAPES["vae"]), shapes, diffusers.DIFFUSERS)
    assert fulfilled.names["encoder.mid_block.attentions.0.to_out.0.weight"] == "encoder.mid_block.attentions.0.proj_attn.weight"
    shapes["encoder.mid_block.attentions.0.to_q.weight"] = Shaped((512, 512))
    with pytest.raises(MappingError, match="are the same tensor"):
        account("vae", plan(diffusers.DIFFUSERS, SHAPES["vae"]), shapes, diffusers.DIFFUSERS)


def test_position_ids_are_left_out_and_the_flat_clip_names_understood() -> None:
    shapes = {name.removeprefix("text_model."): Shaped(shape) for name, shape in published("text_encoder").items()}
    shapes["embeddings.position_ids"] = Shaped((1, 77))
    fulfilled = account("text_encoder", plan(diffusers.CLIP, SHAPES["text_encoder"]), shapes, diffusers.CLIP)
    assert list(fulfilled.ignored) == ["embeddings.position_ids"]
    assert len(fulfilled.names) == 196


def test_a_parameter_that_no_row_describes() -> None:
    with pytest.raises(MappingError, match="no row of the table describes strange/thing"):
        plan(diffusers.DIFFUSERS, {"strange/thing": (3,)})
