"""Kernels in 8 bits: the rounding, the layers, whole networks, and the pipeline."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import ComputeConfig, IdentityNetConfig, sdxl
from instantid_jax.models import Network, WeightsMismatch
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.nn.linear import quantize
from instantid_jax.paths import flatten, unflatten

CONFIG = IdentityNetConfig(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    layers_per_block=1,
    transformer_layers_per_block=(2,),
    attention_head_dim=(2,),
    cross_attention_dim=24,
    norm_num_groups=8,
    addition_embed_type=None,
    conditioning_embedding_out_channels=(8, 8),
)


def restored(tree: dict) -> dict:
    """The float weights that a quantised tree stands for."""
    flat = flatten(tree)
    out = {path: leaf for path, leaf in flat.items() if not path.endswith(("/kernel", "/kernel_scale"))}
    for path, kernel in flat.items():
        if path.endswith("/kernel"):
            scale = flat[f"{path}_scale"]
            out[path] = kernel.astype(jnp.float32) * scale.reshape(*scale.shape[:-1], *[1] * (kernel.ndim - scale.ndim), scale.shape[-1])
    return unflatten(out)


def test_rounding_is_to_half_a_step_of_each_output_channel() -> None:
    rng = np.random.default_rng(0)
    conv = rng.standard_normal((3, 3, 8, 5), np.float32) * np.float32([0.01, 1, 100, 3, 0])
    stacked = rng.standard_normal((2, 6, 4), np.float32)
    tree = {"a": {"kernel": conv, "bias": np.ones(5, np.float32)}, "transformer_blocks": {"b": {"kernel": stacked}}}
    out = flatten(quantize(tree))
    assert out["a/kernel"].dtype == out["transformer_blocks/b/kernel"].dtype == jnp.int8
    assert out["a/kernel_scale"].shape == (5,) and out["transformer_blocks/b/kernel_scale"].shape == (2, 4)
    np.testing.assert_array_equal(out["a/bias"], 1)
    np.testing.assert_allclose(out["a/kernel_scale"][:4], np.abs(conv).max((0, 1, 2))[:4] / 127, rtol=1e-6)
    for path, kernel in (("a/kernel", conv), ("transformer_blocks/b/kernel", stacked)):
        back = flatten(restored(quantize(tree)))[path]
        step = np.expand_dims(out[f"{path}_scale"], tuple(range(1 if "blocks" in path else 0, kernel.ndim - 1)))
        assert (np.abs(back - kernel) <= 0.5001 * step).all()
        assert np.abs(out[path]).max() == 127


def test_a_network_with_8_bits_computes_with_the_rounded_weights() -> None:
    network = Network(IdentityNet, CONFIG, ComputeConfig(), int8=True)
    quantised = quantize(_random(network.plain))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), quantised) == jax.tree.map(lambda a: (a.shape, a.dtype), network.abstract)
    rng = np.random.default_rng(1)
    sample, tokens = rng.standard_normal((1, 8, 8, 4), np.float32), rng.standard_normal((1, 16, 24), np.float32)
    condition, time = rng.standard_normal((1, 8, 8, 16), np.float32), rng.standard_normal((1, 64), np.float32)

    def run(net: Network, weights: dict) -> list:
        def residuals(weights: dict) -> list:
            module = net.bind(weights)
            down, mid = module.residuals(jnp.asarray(sample), jnp.asarray(time), module.project_context(jnp.asarray(tokens)), jnp.asarray(condition))
            return [*down, mid]

        return jax.jit(residuals)(weights)

    for ours, expected in zip(run(network, quantised), run(network.plain, restored(quantised)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def _random(network: Network) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) * 0.1, network.abstract)


def test_from_disk_rounds_and_to_disk_refuses() -> None:
    network = Network(IdentityNet, CONFIG, ComputeConfig(dtype="bfloat16"), int8=True)
    flat = network.plain.to_disk(_random(network.plain))
    tree = network.from_disk(flat)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("int8"), jnp.dtype("bfloat16"), jnp.dtype("float32")}
    with pytest.raises(WeightsMismatch, match="load the model without weights_dtype"):
        network.to_disk(tree)


def test_bytes_at_sdxl_size() -> None:
    """IdentityNet's weights take half of bfloat16's memory, within half a percent."""
    network = Network(IdentityNet, sdxl().identitynet, ComputeConfig(dtype="bfloat16"), int8=True)
    leaves = jax.tree.leaves(network.abstract)
    kernels = sum(leaf.size for leaf in leaves if leaf.dtype == jnp.int8)
    others = sum(leaf.size for leaf in leaves) - kernels  # scales and biases, counted as four bytes
    assert kernels < 1_251_014_160 < kernels + 4 * others < 1.005 * 1_251_014_160


def test_kernels_are_cast_where_they_are_used() -> None:
    """Every 8-bit kernel waits for the layer's input: cast before the denoising loop, all of them would be in memory twice."""
    network = Network(IdentityNet, CONFIG, ComputeConfig(), int8=True)

    def run(weights: dict, sample: jax.Array) -> list:
        module = network.bind(weights)
        context = module.project_context(jnp.zeros((1, 16, 24)))
        return module.residuals(sample, jnp.zeros((1, 64)), context, jnp.zeros((1, 8, 8, 16)))[0]

    def walk(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            yield from (e for p in equation.params.values() if hasattr(p, "jaxpr") for e in walk(p.jaxpr))

    found = list(walk(jax.make_jaxpr(run)(network.abstract, jnp.zeros((1, 8, 8, 4))).jaxpr))
    casts = [e for e in found if e.primitive.name == "convert_element_type" and e.invars[0].aval.dtype == jnp.int8]
    barriers = {id(v) for e in found if e.primitive.name == "optimization_barrier" for v in e.outvars}
    assert len(casts) > 20 and all(id(e.invars[0]) in barriers for e in casts)
