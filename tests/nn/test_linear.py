"""Kernels in 8 bits: the rounding, the layers, whole networks, and the pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.config import ComputeConfig, sdxl, tiny
from instantid_jax.models import Network, WeightsMismatch, build_networks
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.nn.linear import quantize
from instantid_jax.paths import flatten, unflatten


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
    config = tiny().identitynet
    network = Network(IdentityNet, config, ComputeConfig(), int8=True)
    quantised = quantize(_random(network.plain))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), quantised) == jax.tree.map(lambda a: (a.shape, a.dtype), network.abstract)
    rng = np.random.default_rng(1)
    sample, tokens = rng.standard_normal((1, 8, 8, 4), np.float32), rng.standard_normal((1, 16, 80), np.float32)
    condition, time = rng.standard_normal((1, 8, 8, 32), np.float32), rng.standard_normal((1, 128), np.float32)

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
    network = Network(IdentityNet, tiny().identitynet, ComputeConfig(dtype="bfloat16"), int8=True)
    flat = network.plain.to_disk(_random(network.plain))
    tree = network.from_disk(flat)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("int8"), jnp.dtype("bfloat16"), jnp.dtype("float32")}
    with pytest.raises(WeightsMismatch, match="load the model without weights_dtype"):
        network.to_disk(tree)


def test_bytes_at_sdxl_size() -> None:
    """8-bit kernels take half of bfloat16's memory, within half a percent."""
    for name, network in build_networks(sdxl(), ComputeConfig(dtype="bfloat16")).items():
        if name in ("unet", "identitynet"):
            count = sum(leaf.size for leaf in jax.tree.leaves(network.abstract))
            abstract = jax.tree.leaves(Network(network.make, network.config, network.compute, int8=True).abstract)
            kernels = sum(leaf.size for leaf in abstract if leaf.dtype == jnp.int8)
            rest = sum(leaf.size for leaf in abstract) - kernels
            assert count == pytest.approx(kernels, rel=2e-3)
            assert kernels + 4 * rest == pytest.approx(count, rel=5e-3)
