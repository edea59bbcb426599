"""The optimizer: optax transformations in the order clip, update rule, weight decay, learning rate.

The schedule is a function of the number of applied updates. Weight decay leaves biases, norm scales and embeddings alone.
With ``update(..., good=False)`` the optimizer's state stays as it was, and the updates mean nothing.
"""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from instantid_jax.nn.platform import target_platform
from instantid_jax.paths import first_match, map_paths
from instantid_jax.training.config import OptimizerConfig

__all__ = ["ema_decay", "finished", "keep", "learning_rate", "make_optimizer"]

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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The whole update as one optax transformation over the trained tree."""
    rate = learning_rate(config, steps)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(_clip(config.clip_norm))
    decayed = optax.add_decayed_weights(config.weight_decay, _decayed)
    if config.name == "adamw":
        parts.append(optax.chain(_scale_by_adam(config), decayed, _guarded(optax.scale_by_learning_rate(rate))))
    elif config.name == "lion":
        parts.append(_guarded(optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed)))
    elif config.name == "adafactor":
        # optax.adafactor takes the decay off the weights undiminished by the learning rate, which would soon erase them.
        parts += [_guarded(optax.scale_by_factored_rms()), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()]
        parts += [decayed, _guarded(optax.scale_by_learning_rate(rate))]
    else:
        parts.append(_guarded(_prodigy(config, rate)))
    if config.multipliers:
        parts.append(_scale_by_path(config.multipliers))
    return optax.chain(*parts)


def keep(good: Any, new: Any, old: Any) -> Any:
    """The new tree where `good`, a scalar, else the old one."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def finished(tree: Any) -> Any:
    """`tree`, which on a CPU is made before anything is computed from it.

    XLA for CPU makes every array in a loop of its own, and would compute each from the old state, of which it then holds copies: for
    AdamW a third of the memory more, and nearly three times the time.
    """
    return jax.lax.optimization_barrier(tree) if target_platform() == "cpu" else tree


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one factor: XLA repeats a multiplication where it is used, but would keep the quotients of a division."""

    def clip(gradients: Any, _: Any = None) -> Any:
        factor = jnp.minimum(1.0, limit / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: factor * g, gradients)

    return optax.stateless(clip)


def _guarded(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`transformation`, whose state stays as it was where the step is not good."""

    def update(gradients: Any, state: Any, parameters: Any = None, *, good: Any = True, **_: Any) -> Any:
        updates, after = transformation.update(gradients, state, parameters)
        return updates, keep(good, after, state)

    return optax.GradientTransformationExtraArgs(transformation.init, cast(Any, update))


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, guarded; updates are computed from the moments that stay."""
    plain = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(gradients: Any, state: Any, parameters: Any = None, *, good: Any = True, **_: Any) -> Any:
        new = plain.update(gradients, state, parameters)[1]
        after: Any = finished(keep(good, new, state))
        mean: Any = optax.tree.bias_correction(after.mu, config.b1, after.count)
        variance = optax.tree.bias_correction(after.nu, config.b2, after.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps), mean, variance), after

    return optax.GradientTransformationExtraArgs(plain.init, cast(Any, update))


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
