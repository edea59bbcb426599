"""The border between modules and trees: shapes, names, totals, and the way to disk and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import ComputeConfig, ModelConfig, sdxl, tiny
from instantid_jax.models import FROZEN, TRAINABLE, Network, WeightsMismatch, build_networks
from instantid_jax.paths import flatten

# Tensors and parameters of the published files.
PUBLISHED = {
    "unet": (1680, 2_567_463_684),
    "identitynet": (844, 1_251_014_160),
    "resampler": (51, 81_978_624),
    "adapter": (140, 340_787_200),
    "vae": (248, 83_653_863),
    "text_encoder": (196, 123_060_480),
    "text_encoder_2": (517, 694_659_840),
}
# The same, part by part.
PARTS = {
    "unet": {
        "conv_in": (2, 11_840),
        "time_embedding": (4, 2_050_560),
        "add_embedding": (4, 5_245_440),
        "down_blocks/0": (22, 5_432_000),
        "down_blocks/1": (116, 60_105_600),
        "down_blocks/2": (434, 757_404_160),
        "mid_block/resnets": (20, 62_277_120),
        "mid_block/attentions": (206, 350_840_320),
        "up_blocks/0": (656, 1_206_568_960),
        "up_blocks/1": (176, 106_343_680),
        "up_blocks/2": (36, 11_171_840),
        "conv_norm_out": (2, 640),
        "conv_out": (2, 11_524),
    },
    "identitynet": {
        "controlnet_cond_embedding": (16, 1_086_480),
        "controlnet_down_blocks": (18, 4_920_960),
        "controlnet_mid_block": (2, 1_639_680),
        "down_blocks/2": (434, 757_404_160),
    },
    "vae": {
        "encoder/conv_in": (2, 3_584),
        "encoder/down_blocks": (74, 23_627_136),
        "encoder/mid_block": (26, 10_494_976),
        "encoder/conv_out": (2, 36_872),
        "quant_conv": (2, 72),
        "post_quant_conv": (2, 20),
        "decoder/mid_block": (26, 10_494_976),
        "decoder/up_blocks": (106, 38_972_544),
        "decoder/conv_out": (2, 3_459),
    },
    "resampler": {"latents": (1, 20_480), "proj_in": (2, 656_640), "layers": (44, 78_673_920), "proj_out": (2, 2_623_488), "norm_out": (2, 4_096)},
}


@pytest.fixture(scope="module")
def full() -> dict[str, Network]:
    return build_networks(sdxl())


@pytest.fixture(scope="module")
def small() -> dict[str, Network]:
    return build_networks(tiny())


def totals(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> tuple[int, int]:
    chosen = [shape for path, shape in shapes.items() if not prefix or path == prefix or path.startswith(f"{prefix}/")]
    return len(chosen), sum(math.prod(shape) for shape in chosen)


def test_there_are_seven_networks(full: dict[str, Network]) -> None:
    assert set(full) == set(PUBLISHED) == {*FROZEN, *TRAINABLE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sdxl_totals_are_the_published_ones(name: str, full: dict[str, Network]) -> None:
    shapes = full[name].disk_shapes()
    assert totals(shapes) == PUBLISHED[name]
    assert {part: totals(shapes, part) for part in PARTS.get(name, {})} == PARTS.get(name, {})
    assert sum(math.prod(leaf.shape) for leaf in flatten(full[name].abstract).values()) == PUBLISHED[name][1]


def test_equal_layers_are_one_in_memory(full: dict[str, Network]) -> None:
    stacked = flatten(full["unet"].abstract)
    assert stacked["mid_block/attentions/0/transformer_blocks/attn2/to_k/kernel"].shape == (10, 2048, 1280)
    assert len(stacked) < 700
    assert flatten(full["text_encoder_2"].abstract)["encoder/layers/mlp/fc1/kernel"].shape == (32, 1280, 5120)


def test_depths_are_told_apart_on_disk(small: dict[str, Network]) -> None:
    shapes = small["unet"].disk_shapes()
    for module, depth in (
        ("down_blocks/1/attentions/0", 2),
        ("down_blocks/2/attentions/1", 3),
        ("up_blocks/0/attentions/2", 3),
        ("mid_block/attentions/0", 3),
    ):
        found = {path.split("/transformer_blocks/")[1].split("/")[0] for path in shapes if path.startswith(f"{module}/transformer_blocks/")}
        assert found == {str(i) for i in range(depth)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_init_has_the_abstract_tree(name: str, small: dict[str, Network]) -> None:
    assert jax.eval_shape(small[name].init, jax.random.key(0)) == small[name].abstract


@pytest.mark.parametrize("name", ["resampler", "adapter", "text_encoder"])
def test_init_is_finite_and_depends_on_the_key(name: str, small: dict[str, Network]) -> None:
    first, second = (flatten(small[name].init(jax.random.key(i))) for i in (0, 1))
    for path, leaf in first.items():
        assert leaf.dtype == jnp.float32
        assert bool(jnp.isfinite(leaf).all()), path
        assert path.endswith(("bias", "scale")) == bool((leaf == second[path]).all()), path


def test_init_gives_every_layer_of_a_stack_its_own_weights(small: dict[str, Network]) -> None:
    kernels = flatten(small["resampler"].init(jax.random.key(0)))["layers/attn/to_q/kernel"]
    assert not np.allclose(kernels[0], kernels[1])


def test_identitynet_starts_as_no_change(small: dict[str, Network]) -> None:
    flat = flatten(small["identitynet"].init(jax.random.key(0)))
    zero = [p for p in flat if p.startswith(("controlnet_down_blocks/", "controlnet_mid_block/", "controlnet_cond_embedding/conv_out/"))]
    assert len(zero) == 2 * (9 + 1 + 1)
    assert all(not flat[path].any() for path in zero)


@pytest.mark.parametrize("name", PUBLISHED)
def test_disk_round_trip_is_exact(name: str, small: dict[str, Network]) -> None:
    network = small[name]
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(shape, dtype=np.float32) for path, shape in network.disk_shapes().items()}
    parameters = network.from_disk({path: jnp.asarray(x) for path, x in flat.items()})
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(lambda leaf: leaf.shape, network.abstract)
    again = network.to_disk(parameters)
    assert again.keys() == flat.keys()
    assert all(np.array_equal(again[path], flat[path]) for path in flat)


def test_weights_that_do_not_fit_are_listed(small: dict[str, Network]) -> None:
    network = small["resampler"]
    flat = {path: np.zeros(shape, np.float32) for path, shape in network.disk_shapes().items()}
    del flat["layers/1/ff/norm/bias"]
    flat["layers/2/ff/norm/bias"] = np.zeros(64, np.float32)
    flat["proj_in/kernel"] = np.zeros((512, 64), np.float32)
    with pytest.raises(WeightsMismatch) as refused:
        network.from_disk(flat, "the resampler of the test")
    message = str(refused.value)
    assert "the resampler of the test" in message
    assert "missing (1): layers/1/ff/norm/bias" in message
    assert "unknown (1): layers/2/ff/norm/bias" in message
    assert "misshaped (1): proj_in/kernel: (512, 64) where (128, 64) is needed" in message


def test_a_long_list_is_cut_but_counted(small: dict[str, Network]) -> None:
    with pytest.raises(WeightsMismatch, match=r"missing \(840\): (\S+, ){4}\S+$"):
        small["unet"].from_disk({}, "unet")


def test_network_is_hashable_and_equal_by_what_it_is() -> None:
    a, b = build_networks(tiny())["unet"], build_networks(tiny())["unet"]
    assert a == b
    assert hash(a) == hash(b)
    assert a != build_networks(tiny(), ComputeConfig(dtype="bfloat16"))["unet"]


def test_vae_can_have_its_own_precision() -> None:
    networks = build_networks(tiny(), ComputeConfig(dtype="float16"), vae_compute=ComputeConfig())
    assert networks["vae"].compute.dtype == "float32"
    assert networks["unet"].compute.dtype == "float16"


def test_compute_settings_do_not_change_the_tree() -> None:
    switched = build_networks(tiny(), ComputeConfig(dtype="bfloat16", attention="xla", unroll=True, remat=True))
    for name, network in build_networks(tiny()).items():
        assert network.disk_shapes() == switched[name].disk_shapes()


def test_default_configuration_is_sdxl() -> None:
    assert ModelConfig() == sdxl()


def test_equal_networks_are_traced_once() -> None:
    one, other = (build_networks(tiny())["resampler"] for _ in range(2))
    assert one is not other and one.abstract is other.abstract
