"""The optimizer: optax transformations in the order clip, update rule, weight decay, learning rate.

The schedule is a function of the number of applied updates. Weight decay leaves biases, norm scales and embeddings alone.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from instantid_jax.paths import first_match, map_paths
from instantid_jax.training.config import OptimizerConfig

__all__ = ["ema_decay", "learning_rate", "make_optimizer"]

_UNDECAYED = ("bias", "scale", "embedding", "latents")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate after n updates: linear warm-up to the peak, a hold, then the decay down to `final` at `steps`."""
    peak, warmup = config.learning_rate, config.warmup
    hold = round((steps - warmup) * (1.0 if config.schedule == "constant" else config.hold))
    decay = max(steps - warmup - hold, 1)
    if warmup > steps:
        raise ValueError(f"optimizer.warmup {warmup} is longer than the run of {steps} steps")

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        rising = jnp.minimum((n + 1) / (warmup + 1), 1.0)
        part = jnp.clip((n - warmup - hold) / decay, 0.0, 1.0)
        if config.schedule == "constant":
            falling = jnp.ones_like(part)
        elif config.schedule == "cosine":
            falling = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(math.pi * part))
        else:
            falling = 1 - (1 - config.final) * part
        return peak * rising * falling

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole update as one optax transformation over the trained tree."""
    rate = learning_rate(config, steps)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    decay = {"weight_decay": config.weight_decay, "mask": _decayed}
    if config.name == "adamw":
        parts.append(optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, **decay))
    elif config.name == "lion":
        parts.append(optax.lion(rate, b1=config.b1, b2=config.b2, **decay))
    elif config.name == "adafactor":
        # optax.adafactor takes the decay off the weights undiminished by the learning rate, which would soon erase them.
        parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()]
        parts += [optax.add_decayed_weights(config.weight_decay, _decayed), optax.scale_by_learning_rate(rate)]
    else:
        parts.append(_prodigy(config, rate))
    if config.multipliers:
        parts.append(_scale_by_path(config.multipliers))
    return optax.chain(*parts)


def _prodigy(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """optax's Prodigy with a decay that spares what `_decayed` spares, which optax's own does not."""
    plain: Any = optax.contrib.prodigy(rate, betas=(config.b1, config.b2), eps=config.eps)

    def update(gradients: Any, state: Any, parameters: Any = None) -> Any:
        updates, after = plain.update(gradients, state, parameters)
        n = after.count.astype(jnp.float32)
        step = state.estim_lr * rate(state.count) * jnp.sqrt(1 - config.b2**n) / (1 - config.b1**n)
        decay = config.weight_decay * step
        return jax.tree.map(lambda u, p, on: u - decay * p if on else u, updates, parameters, _decayed(parameters)), after

    return optax.GradientTransformation(plain.init, cast(Any, update))


def _decayed(parameters: Any) -> Any:
    """True where weight decay applies."""
    return map_paths(lambda path, _: path.rsplit("/", 1)[-1] not in _UNDECAYED, parameters)


def _scale_by_path(rules: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any = None) -> Any:
        def one(path: str, update: jax.Array) -> jax.Array:
            factor = first_match(rules, path)
            return update if factor is None else factor * update

        return map_paths(one, updates)

    return optax.stateless(scale)


def ema_decay(limit: float, updates: jax.Array) -> jax.Array:
    """Decay of the moving average after so many updates: short memory at first, so that the start is soon forgotten."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(limit, (1 + n) / (10 + n))
