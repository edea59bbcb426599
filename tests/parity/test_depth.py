"""Every tensor of every network is used, and no layer of a stack stands in for another.

All layers of a stack share one traced body, so a wrong slice of the stacked weights would be a layer that does not count,
or counts twice. Weights differ everywhere, so parity already speaks against it; these tests look at each layer alone.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CONFIGS, inputs
from oracle import error, random, weights

from instantid_jax.models import build_networks
from instantid_jax.models.encoder import AddedConditions, IdentityContext
from instantid_jax.nn.attention import KeysValues

# Eight groups in the autoencoder: in a group of one channel the normalisation would take every bias before it away.
CONFIG = dataclasses.replace(CONFIGS["tiny"], vae=dataclasses.replace(CONFIGS["tiny"].vae, norm_num_groups=8))
NETWORKS = build_networks(CONFIG)
STEP = inputs(CONFIG, (8, 8), batch=1)


def as_arrays(x: Any) -> Any:
    return jax.tree.map(jnp.asarray, x)


def unet(m: Any) -> Any:
    x = as_arrays(STEP)
    identity = IdentityContext({site: fixed(t, 16) for site, t in m.sites().items()}, jnp.float32(1))
    return m(x.sample, x.timestep, m.project_context(x.text), AddedConditions(x.pooled, x.sizes), identity=identity)


def fixed(transformer: Any, tokens: int) -> KeysValues:
    """Identity keys and values that belong to no weights."""
    heads, channels = transformer.transformer_blocks.attn2.heads, transformer.proj_in.kernel.shape[-1]
    depth = transformer.transformer_blocks.norm1.scale.shape[0]
    k, v = (jnp.asarray(random(name, depth, 1, tokens, heads, channels // heads)) for name in "kv")
    return KeysValues(k, v)


def identitynet(m: Any) -> Any:
    x = as_arrays(STEP)
    added = AddedConditions(x.pooled, x.sizes)
    out = m(x.sample, x.timestep, m.project_context(x.tokens), added, m.embed_condition(x.image))
    return [*out.down, out.mid]


def vae(m: Any) -> Any:
    picture, latent = (as_arrays(random(name, *shape)) for name, shape in (("picture", (1, 64, 64, 3)), ("latent", (1, 8, 8, 4))))
    moments = m.encode(picture)
    return [moments.mean, moments.logvar, m.decode(latent)]


def text(m: Any) -> Any:
    ids = jnp.arange(m.config.max_position_embeddings)[None] * 600
    states = m(ids.at[0, -1].set(49407))
    return [states.hidden[-2], states.pooled]


RUNS: dict[str, Callable[[Any], Any]] = {
    "unet": unet,
    "identitynet": identitynet,
    "resampler": lambda m: m(as_arrays(random("face", 2, CONFIG.resampler.embedding_dim))),
    "adapter": lambda m: jax.tree.leaves(m(as_arrays(STEP.tokens))),
    "vae": vae,
    "text_encoder": text,
    "text_encoder_2": text,
}


@functools.cache
def parameters(name: str) -> Any:
    network = NETWORKS[name]
    return network.from_disk(as_arrays(weights(network, name)))


def loss(tree: Any, name: str) -> Any:
    """A sum over all outputs with fixed random weights, so that no symmetry can hide a gradient."""
    outputs = jax.tree.leaves(RUNS[name](NETWORKS[name].bind(tree)))
    return sum(jnp.vdot(y, as_arrays(random(f"loss{i}", *y.shape))) for i, y in enumerate(outputs))


# A bias of the keys adds the same number to all scores of a query, which the softmax takes away again.
NO_GRADIENT = ("to_k/bias", "k_proj/bias")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "unet" else ()) for name in NETWORKS])
def test_every_tensor_is_used(name: str) -> None:
    """The gradient reaches each published tensor, so each is read, and none by way of another."""
    gradients = NETWORKS[name].to_disk(jax.jit(jax.grad(loss), static_argnums=1)(parameters(name), name))
    assert gradients.keys() == NETWORKS[name].disk_shapes().keys()
    unused = [path for path, gradient in gradients.items() if not float(jnp.abs(gradient).max()) > 1e-4]
    assert unused == [path for path in gradients if path.endswith(NO_GRADIENT)]


@functools.partial(jax.jit, static_argnums=1)
def outputs(tree: Any, name: str) -> list[Any]:
    return jax.tree.leaves(RUNS[name](NETWORKS[name].bind(tree)))


DEPTHS = {"unet": 28, "identitynet": 13, "resampler": 2, "adapter": 28, "text_encoder": 2, "text_encoder_2": 3}


@pytest.mark.parametrize("name", DEPTHS)
def test_every_layer_counts(name: str) -> None:
    """With the weights of any one layer of a stack at zero, the output is another."""
    flat = NETWORKS[name].to_disk(parameters(name))
    layers = dict.fromkeys(found.group(1) for path in flat if (found := re.match(r"(.*(?:transformer_blocks|layers)/\d+)/", path)))
    assert len(layers) == DEPTHS[name]
    before = outputs(parameters(name), name)
    for layer in layers:
        without = {path: jnp.zeros_like(x) if path.startswith(f"{layer}/") else x for path, x in flat.items()}
        after = outputs(NETWORKS[name].from_disk(without), name)
        assert max(error(a, b) for a, b in zip(after, before, strict=True)) > 1e-3, layer
