"""Tiles of the autoencoder: diffusers' layout against diffusers, and both layouts against no tiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CONFIGS
from oracle import error, load, nchw, nhwc, random, rms_error, torch_vae, weights

from instantid_jax.config import ComputeConfig
from instantid_jax.models import Network
from instantid_jax.models.tiling import Tiling, _positions, decode_tiled, encode_tiled
from instantid_jax.models.vae import Autoencoder

CONFIG = dataclasses.replace(CONFIGS["tiny"].vae, block_out_channels=(16, 32), layers_per_block=1)  # two latent pixels a side are 4 of the picture
NETWORK = Network(Autoencoder, CONFIG, ComputeConfig())
FLAT = weights(NETWORK)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(method: str, tiling: Tiling | None, parameters: Any, x: jax.Array) -> jax.Array:
    vae = NETWORK.bind(parameters)
    if method == "decode":
        return vae.decode(x) if tiling is None else decode_tiled(vae, x, tiling)
    return vae.encode(x).mean if tiling is None else encode_tiled(vae, x, tiling).mean


def ours(method: str, tiling: Tiling | None, x: np.ndarray) -> np.ndarray:
    return np.asarray(_run(method, tiling, NETWORK.from_disk({p: jnp.asarray(a) for p, a in FLAT.items()}), jnp.asarray(x)))


@functools.cache
def theirs(tile: int) -> Any:
    vae = load(torch_vae(CONFIG), FLAT)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // CONFIG.downscale
    return vae


@pytest.mark.parametrize("size", [(20, 20), (8, 21), (26, 14)])
def test_diffusers_layout_is_diffusers(size: tuple[int, int]) -> None:
    """Tiles of 8 latent pixels every 6; the last of a row may be a sliver."""
    tiling = Tiling("diffusers", 16)
    z, image = random("z", 2, *size, 4), random("image", 1, size[0] * 2, size[1] * 2, 3)
    with torch.no_grad():
        expected = theirs(16).decode(nchw(z)).sample, theirs(16).encode(nchw(image)).latent_dist.mean
    assert error(ours("decode", tiling, z), nhwc(expected[0])) <= 1e-5
    assert error(ours("encode", tiling, image), nhwc(expected[1])) <= 1e-5


@pytest.mark.parametrize("layout", ["even", "diffusers"])
def test_one_tile_is_no_tile(layout: Any) -> None:
    z, image = random("z", 2, 12, 9, 4), random("image", 2, 24, 18, 3)
    np.testing.assert_allclose(ours("decode", Tiling(layout, 24), z), ours("decode", None, z), atol=1e-5)
    np.testing.assert_allclose(ours("encode", Tiling(layout, 24), image), ours("encode", None, image), atol=1e-5)


def test_even_tiles_are_nearer_to_no_tiles() -> None:
    z, image = random("z", 1, 40, 28, 4), random("image", 1, 80, 56, 3)
    for method, x in (("decode", z), ("encode", image)):
        whole = ours(method, None, x)
        even, theirs = (rms_error(ours(method, Tiling(layout, 32), x), whole) for layout in ("even", "diffusers"))
        assert even < 0.7 * theirs


@pytest.mark.parametrize(("length", "tile"), [(8, 8), (9, 8), (14, 8), (15, 8), (20, 8), (21, 8), (256, 64), (200, 128)])
def test_weights_of_tiles_add_up_to_one(length: int, tile: int) -> None:
    starts, weights = _positions(length, tile, 4)
    total = np.zeros(length * 4)
    for start, weight in zip(starts, weights, strict=True):
        total[start * 4 : (start + tile) * 4] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert starts[0] == 0 and starts[-1] == length - tile and (np.diff(starts) <= tile - tile // 4).all()
    # Where one tile meets the edge of another it counts for nothing.
    assert all(weight[0] < 0.2 for weight in weights[1:])


def test_a_tile_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8 pixels"):
        ours("decode", Tiling("even", 12), random("z", 1, 20, 20, 4))
