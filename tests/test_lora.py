"""What LoRAs promise: an order that does not matter, the same numbers merged and apart, strengths that compile nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from lora_files import ALL, write_lora

from convert_weights.lora import read_lora
from instantid_jax.defaults import random_pipeline
from instantid_jax.face import draw_kps
from instantid_jax.lora import LORA_NETWORKS, Factors, Lora, LoraError, apply_loras, merge_lora, stack_lora
from instantid_jax.paths import flatten, stack_layers, unflatten
from instantid_jax.pipeline import InstantIDPipeline

KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])
EMBEDDING = np.random.default_rng(0).standard_normal(128).astype(np.float32)
SCALES = (0.8, -0.5, 1.3)


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


@pytest.fixture(scope="module")
def loras(pipe: InstantIDPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Lora]:
    """Three of different styles, ranks and layers, the last with lengths."""
    folder = tmp_path_factory.mktemp("loras")
    unet = {"unet": ALL["unet"]}
    made = [
        write_lora(folder / "a.safetensors", pipe.config, "kohya", seed="a"),
        write_lora(folder / "b.safetensors", pipe.config, "original", seed="b", sites=unet, rank=5),
        write_lora(folder / "c.safetensors", pipe.config, "peft", seed="c", sites={"unet": ALL["unet"][1:9]}, dora=True),
    ]
    return [read_lora(file, pipe.config) for file in made]


def on_disk(pipe: InstantIDPipeline, network: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in pipe.networks[network].to_disk(pipe.parameters[network]).items()}


def make(pipe: InstantIDPipeline, **changes: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"} | changes
    return pipe("a person", draw_kps((64, 64), KPS), EMBEDDING, **arguments).images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_order_gives_the_same_bits(dtype: str, pipe: InstantIDPipeline, loras: list[Lora]) -> None:
    flat = {path: x.astype(dtype) for path, x in on_disk(pipe, "unet").items()}
    first = merge_lora(flat, "unet", loras, SCALES)
    for order in ((2, 1, 0), (1, 2, 0), (2, 0, 1)):
        again = merge_lora(flat, "unet", [loras[i] for i in order], [SCALES[i] for i in order])
        assert first.keys() == again.keys()
        for path, x in first.items():
            assert x.dtype == flat[path].dtype and x.tobytes() == again[path].tobytes(), path


def test_only_what_a_lora_names_changes(pipe: InstantIDPipeline, loras: list[Lora]) -> None:
    for network in LORA_NETWORKS:
        flat = on_disk(pipe, network)
        merged = merge_lora(flat, network, loras, SCALES)
        named = {path for lora in loras for path in lora.networks.get(network, {})}
        assert {path for path in flat if merged[path] is not flat[path]} == named
        assert all(np.abs(merged[path] - flat[path]).max() > 1e-3 for path in named)
    for network in ("identitynet", "adapter", "resampler", "vae"):
        flat = on_disk(pipe, network)
        assert all(merge_lora(flat, network, loras, SCALES)[path] is x for path, x in flat.items())


def test_merging_is_the_formula() -> None:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    kernel, length = normal(3, 3, 5, 7), normal(7)
    factors = Factors(normal(3, 3, 5, 2), normal(2, 7), 0.75, length)
    plain = dataclasses.replace(factors, magnitude=None)
    one, other = (Lora(name, name, {"unet": {"x/kernel": f}}) for name, f in (("a", factors), ("b", plain)))
    moved = kernel.astype(np.float64)
    for h, w, i, o in np.ndindex(3, 3, 5, 7):
        moved[h, w, i, o] += 0.4 * 0.75 * (factors.down[h, w, i].astype(np.float64) @ factors.up[:, o])
    normed = length * moved / np.sqrt((moved**2).sum(axis=(0, 1, 2)))
    np.testing.assert_allclose(merge_lora({"x/kernel": kernel}, "unet", [other], [0.4])["x/kernel"], moved, atol=1e-6)
    np.testing.assert_allclose(merge_lora({"x/kernel": kernel}, "unet", [one], [0.4])["x/kernel"], normed, atol=1e-6)
    both = merge_lora({"x/kernel": kernel}, "unet", [one, other], [0.4, 0.4])["x/kernel"]
    np.testing.assert_allclose(both, moved + normed - kernel, atol=1e-6)


@pytest.mark.parametrize("network", LORA_NETWORKS)
def test_stacked_layers_change_as_single_ones_do(network: str, pipe: InstantIDPipeline, loras: list[Lora]) -> None:
    net, flat = pipe.networks[network], on_disk(pipe, network)
    chosen = [(lora, scale) for lora, scale in zip(loras, SCALES, strict=True) if network in lora.networks]
    stacks = [(stack_lora(lora.networks[network], net.abstract), scale) for lora, scale in chosen]
    apart = flatten(jax.jit(apply_loras)(unflatten(stack_layers(flat, np.stack)), stacks))
    merged = stack_layers(merge_lora(flat, network, [lora for lora, _ in chosen], [scale for _, scale in chosen]), np.stack)
    assert apart.keys() == merged.keys()
    for path, x in merged.items():
        np.testing.assert_allclose(np.asarray(apart[path]), x, atol=2e-6 * np.abs(x).max(), err_msg=path)


def test_kept_apart_is_merged_and_strengths_compile_nothing(loras: list[Lora], compilations: Any) -> None:
    pipe, merged = random_pipeline(), random_pipeline()
    before = jax.tree.map(lambda x: x, pipe.parameters)
    plain = make(pipe)
    pipe.set_loras(loras, SCALES)
    for network in LORA_NETWORKS:
        flat = merge_lora(on_disk(pipe, network), network, loras, SCALES)
        merged.parameters[network] = merged.networks[network].from_disk(flat)
    expected = make(merged)
    apart = make(pipe)
    assert np.abs(apart - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(make(pipe, on_step=lambda _: None), apart)
    assert np.abs(plain - expected).max() > 0.05 * np.abs(expected).max()
    with compilations() as compiled:
        pipe.set_lora_scales([0.1, 2.0, -0.3])
        other = make(pipe)
    assert not compiled and np.abs(other - expected).max() > 1e-3
    pipe.set_loras([])
    np.testing.assert_array_equal(make(pipe), plain)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(pipe.parameters), strict=True):
        assert old is new


def test_a_strength_of_zero_is_the_base(pipe: InstantIDPipeline, loras: list[Lora]) -> None:
    flat = on_disk(pipe, "unet")
    merged = merge_lora(flat, "unet", loras[:2], [0, 0])
    assert all(np.array_equal(merged[path], x) for path, x in flat.items())


def test_refusals(pipe: InstantIDPipeline, loras: list[Lora]) -> None:
    flat, abstract = on_disk(pipe, "unet"), pipe.networks["unet"].abstract
    with pytest.raises(LoraError, match="2 LoRA strengths are given for 3 LoRAs; give one for each, or none"):
        pipe.set_loras(loras, [1, 2])
    with pytest.raises(LoraError, match=r"the strength of a\.safetensors must be a finite number, not nan"):
        merge_lora(flat, "unet", loras, [float("nan"), 1, 1])
    wrong = Lora("odd", "", {"unet": {"conv_in/kernel": Factors(np.ones((3, 3, 9, 2)), np.ones((2, 32)), 1.0)}})
    with pytest.raises(LoraError, match=r"odd: unet's 'conv_in/kernel' has the shape \[3, 3, 4, 32\], its LoRA is for \[3, 3, 9, 32\]"):
        merge_lora(flat, "unet", [wrong])
    with pytest.raises(LoraError, match="'conv_in/kernel' has the shape"):
        stack_lora(wrong.networks["unet"], abstract)
    absent = Lora("odd", "", {"unet": {"to_q_ip/kernel": wrong.networks["unet"]["conv_in/kernel"]}})
    with pytest.raises(LoraError, match="which these weights do not have; the LoRA is of another model"):
        merge_lora(flat, "unet", [absent])
    deep = {"down_blocks/1/attentions/0/transformer_blocks/9/attn1/to_q/kernel": Factors(np.ones((64, 2)), np.ones((2, 64)), 1.0)}
    with pytest.raises(LoraError, match="is no weight of this network"):
        stack_lora(deep, abstract)


def test_from_pretrained_merges(tmp_path: Path, loras: list[Lora]) -> None:
    from instantid_jax.defaults import DEFAULT_WEIGHTS, default_config

    file = write_lora(tmp_path / "x.safetensors", default_config(), sites={"text_encoder": ("encoder/layers/0/self_attn/q_proj/kernel",)})
    lora = read_lora(file, default_config())
    plain = InstantIDPipeline.from_pretrained(DEFAULT_WEIGHTS)
    changed = InstantIDPipeline.from_pretrained(DEFAULT_WEIGHTS, loras=[lora], lora_scales=[0.5])
    a, b = flatten(plain.parameters), flatten(changed.parameters)
    assert [path for path in a if not np.array_equal(a[path], b[path])] == ["text_encoder/encoder/layers/self_attn/q_proj/kernel"]
    with pytest.raises(LoraError, match="another model"):
        InstantIDPipeline.from_pretrained(DEFAULT_WEIGHTS, loras=loras)
