"""The state of a run: trained parameters, optimizer, moving average, step. Frozen weights are kept apart and never change.

Trees of a training are nested dicts ``{network: parameters}``; `split` cuts one in two by path and `merge` puts it together.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from instantid_jax.checkpoint import has_weights, load_weights
from instantid_jax.models import Network
from instantid_jax.paths import Tree, flatten, map_paths, partition, unflatten
from instantid_jax.published import ConfigError
from instantid_jax.training.config import InitConfig, StageConfig

__all__ = ["InitError", "TrainState", "check_start", "initial_parameters", "initial_state", "merge", "split"]


class InitError(ValueError):
    """Weights that a run cannot start from; the message names the network and the remedy."""


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    step: jax.Array
    """Batches seen, int32."""
    updates: jax.Array
    """Updates applied, int32: fewer than the batches where bad ones were skipped."""
    parameters: Tree
    """The trained part, float32."""
    optimizer: Any
    ema: Tree
    """Moving average of `parameters`; empty without one."""


def split(tree: Mapping[str, Any], stage: StageConfig) -> tuple[Tree, Tree]:
    """(trained, frozen) parts of ``{network: parameters}``. Raises `PathError` for a pattern that matches nothing."""
    return partition(tree, stage.trainable)


def check_multipliers(trained: Tree, multipliers: Iterable[tuple[str, float]]) -> None:
    """Raises `ConfigError` for a learning-rate factor whose pattern matches nothing that is trained."""
    paths = flatten(trained)
    for pattern, _ in multipliers:
        if not any(re.search(pattern, path) for path in paths):
            known = ", ".join(sorted({path.split("/")[0] for path in paths}))
            raise ConfigError(f"TrainConfig.optimizer.multipliers: {pattern!r} matches no trained parameter; those are of {known}")


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """The inverse of `split`."""
    return unflatten(flatten(trained) | flatten(frozen))


def initial_state(parameters: Tree, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """State before the first step. `parameters` is the trained part."""
    copy = jax.tree.map(jnp.array, parameters) if ema else {}
    return TrainState(jnp.int32(0), jnp.int32(0), parameters, optimizer.init(parameters), copy)


def initial_parameters(networks: Mapping[str, Network], init: InitConfig, key: jax.Array, only: Collection[str] | None = None) -> Tree:
    """Weights of every network, or of `only` these, each from where `init` says."""
    wanted = set(networks if only is None else only)
    derived = wanted & set(init.from_base)
    tree: Tree = {}
    for number, (name, network) in enumerate(networks.items()):
        if name not in wanted and not (name == "unet" and derived):
            continue
        if name in init.random:
            tree[name] = _random(network, jax.random.fold_in(key, number))
            if name == "vae" and init.latent_logvar is not None:
                tree[name] = _quiet_latents(tree[name], init.latent_logvar)
        elif name not in init.from_base:
            tree[name] = network.from_disk(load_weights(_folder(init, name), later=True), name)
    for number, (name, network) in enumerate(networks.items()):
        if name in derived:
            if name == "adapter":
                tree[name] = _adapter(network.abstract, tree["unet"])
                continue
            new = _new_parts(network, jax.random.fold_in(key, 1000 + number))
            tree[name] = _identitynet(network.abstract, new, tree["unet"])
            if init.condition_gain is not None:
                tree[name] = _live_condition(tree[name], init.condition_gain, jax.random.fold_in(key, 2000))
    return {name: tree[name] for name in networks if name in wanted}


def check_start(networks: Iterable[str], init: InitConfig) -> None:
    """Raises `InitError` where one of `networks` is to be read from a folder that does not have it. Reads no weights."""
    for name in networks:
        if name not in init.random and name not in init.from_base:
            _folder(init, name)


def _folder(init: InitConfig, name: str) -> Path:
    if init.weights is None:
        raise InitError(f"{name} has no start: name a folder in init.weights, or list it in init.random or init.from_base")
    if not Path(init.weights).is_dir():
        raise InitError(f"there is no folder {init.weights}, which init.weights names; convert or train these weights first")
    folder = Path(init.weights) / name
    if not has_weights(folder):
        raise InitError(f"{init.weights} has no weights of {name}; list it in init.random or init.from_base, or give another folder")
    return folder


@functools.partial(jax.jit, static_argnums=0)
def _random(network: Network, key: jax.Array) -> Tree:
    return network.init(key)


@functools.partial(jax.jit, static_argnums=0)
def _new_parts(network: Network, key: jax.Array) -> dict[str, jax.Array]:
    """What IdentityNet has and the UNet has not, flat: the keypoint convolutions and the zero convolutions."""
    return {path: leaf for path, leaf in flatten(network.init(key)).items() if path.startswith("controlnet_")}


def _identitynet(shapes: Tree, new: Mapping[str, jax.Array], unet: Tree) -> Tree:
    """The UNet's encoder with all its embeddings, `add_embedding` too, and the new parts."""
    base, own = flatten(unet), flatten(shapes)
    missing = sorted(path for path in own.keys() - new.keys() if path not in base or base[path].shape != own[path].shape)
    if missing:
        raise InitError(f"identitynet cannot start from this unet: {missing[0]} and {len(missing) - 1} others differ")
    return unflatten({path: new[path] if path in new else base[path] for path in own})


def _adapter(shapes: Tree, unet: Tree) -> Tree:
    """Every `to_k_ip` and `to_v_ip` is the `to_k` or `to_v` of its site."""
    base = flatten(unet)
    return map_paths(lambda path, leaf: jnp.array(base[path.replace("_ip/", "/")]).reshape(leaf.shape), shapes)


def _quiet_latents(tree: Tree, logvar: float) -> Tree:
    """An autoencoder whose latents start with this log-variance: it is the bias of the layer that gives their distribution."""
    last = "quant_conv/bias" if "quant_conv" in tree else "encoder/conv_out/bias"

    def shift(path: str, leaf: jax.Array) -> jax.Array:
        return leaf.at[leaf.shape[0] // 2 :].set(logvar) if path == last else leaf

    return map_paths(shift, tree)


def _live_condition(tree: Tree, gain: float, key: jax.Array) -> Tree:
    """Keypoint convolutions that keep the signal's size: normal with variance gain / fan-in; the last with half that deviation."""

    def redraw(path: str, leaf: jax.Array) -> jax.Array:
        if not path.startswith("controlnet_cond_embedding/") or not path.endswith("kernel"):
            return leaf
        number = sum(map(ord, path))
        deviation = (gain / (leaf.shape[0] * leaf.shape[1] * leaf.shape[2])) ** 0.5 * (0.5 if "conv_out" in path else 1.0)
        return deviation * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)

    return map_paths(redraw, tree)
