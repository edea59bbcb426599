"""One training step, one compiled program: draws, loss, gradient, guard, update, moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from instantid_jax.paths import Tree
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.objectives import Objective, PerSample, draw, per_sample
from instantid_jax.training.optim import ema_decay, finished, keep, learning_rate
from instantid_jax.training.state import TrainState, merge

__all__ = ["Metrics", "make_evaluation", "make_step"]


class Metrics(NamedTuple):
    """What a step tells, as device arrays: fetching them at once would wait for the step."""

    loss: Array
    """The weighted loss that was differentiated."""
    plain_loss: Array
    """The same without weights over noise levels: comparable between recipes."""
    gradient_norm: Array
    """Before clipping."""
    learning_rate: Array
    good: Array
    """Whether the update was applied."""
    bucket_loss: Array
    """Sum of the plain loss by noise level, [buckets], low noise first."""
    bucket_count: Array
    sample_loss: Array
    """The weighted loss of every sample, [b]."""


Step = Callable[[TrainState, Tree, Mapping[str, Array], Array], tuple[TrainState, Metrics]]


def make_step(objective: Objective, config: TrainConfig, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """``step(state, frozen, batch, limit) -> state, metrics``, to be jitted with the state donated.

    A loss above `limit` (a traced scalar, infinity for none), or anything not finite, leaves parameters, optimizer and
    average as they were; `state.step` counts on, so the batch is not met again.
    """
    rate, root = learning_rate(config.optimizer, config.steps), jax.random.key(config.seed)
    gradient = _make_gradient(objective, config.optimizer.accumulate)

    def step(state: TrainState, frozen: Tree, batch: Mapping[str, Array], limit: Array) -> tuple[TrainState, Metrics]:
        draws = draw(objective, jax.random.fold_in(root, state.step), batch)
        value, rows, grads = gradient(state.parameters, frozen, batch, draws)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm) & (value <= limit)
        updates, moments = optimizer.update(grads, state.optimizer, state.parameters, good=good)
        parameters = keep(good, optax.apply_updates(state.parameters, updates), state.parameters)
        ema = state.ema
        if config.optimizer.ema is not None:
            decay, parameters = ema_decay(config.optimizer.ema, state.updates), finished(parameters)
            ema = keep(good, jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, parameters), ema)
        fresh = TrainState(state.step + 1, state.updates + good.astype(jnp.int32), parameters, moments, ema)
        buckets = jax.nn.one_hot((rows.time * config.log.bucket_count).astype(jnp.int32), config.log.bucket_count)
        told = Metrics(
            value, jnp.mean(rows.plain), norm, jnp.asarray(rate(state.updates)), good, rows.plain @ buckets, jnp.sum(buckets, 0), rows.loss
        )
        return fresh, told

    return step


def _make_gradient(objective: Objective, parts: int) -> Callable[[Tree, Tree, Mapping[str, Array], Any], tuple[Array, PerSample, Tree]]:
    """``gradient(trained, frozen, batch, draws) -> mean loss, rows, gradient``, of the batch at once or as the mean over `parts` of it."""

    def loss(trained: Tree, frozen: Tree, batch: Any, draws: Any) -> tuple[Array, PerSample]:
        rows = per_sample(objective, merge(trained, frozen), batch, draws)
        return jnp.mean(rows.loss), rows

    def whole(trained: Tree, frozen: Tree, batch: Any, draws: Any) -> tuple[Array, PerSample, Tree]:
        (value, rows), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, draws)
        return value, rows, grads

    def summed(trained: Tree, frozen: Tree, batch: Any, draws: Any) -> tuple[Array, PerSample, Tree]:
        def add(total: Any, part: Any) -> tuple[Any, PerSample]:
            value, rows, grads = whole(trained, frozen, *part)
            return jax.tree.map(jnp.add, total, (value, grads)), rows

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, trained)
        total, rows = jax.lax.scan(add, zeros, jax.tree.map(lambda x: _interleaved(x, parts), (dict(batch), draws)))
        value, grads = jax.tree.map(lambda x: x / parts, total)
        return value, PerSample(*(jnp.swapaxes(x, 0, 1).reshape(-1) for x in rows)), grads

    return whole if parts == 1 else summed


def _interleaved(x: Array, parts: int) -> Array:
    """[b, ...] to [parts, b / parts, ...]; part i has every parts-th row, so that each device has rows of every part."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def make_evaluation(objective: Objective) -> Callable[..., dict[str, Array]]:
    """``evaluate(trained, frozen, batch, key)``: mean losses of a batch with fixed draws.

    Beside the loss it tells by how much the plain loss grows with somebody else's embedding, and with somebody else's keypoints:
    the two signals that show identity and pose being learned long before pictures do. Neighbours in the batch are exchanged. The
    identity loss takes no part in them: the embedding is its target too, so it would grow before anything is learned.
    """

    def evaluate(trained: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array) -> dict[str, Array]:
        draws, parameters = draw(objective, key, batch), merge(trained, frozen)

        right = per_sample(objective, parameters, batch, draws)

        def gap(name: str) -> Array:
            changed = dict(batch) | {name: jnp.roll(batch[name], 1, axis=0)}
            return jnp.mean(per_sample(objective, parameters, changed, draws).plain - right.plain)

        out, stage = {"loss": jnp.mean(right.loss)}, objective.stage
        if "resampler" in stage.networks:
            out["wrong_person_gap"] = gap("embedding")
        if "identitynet" in stage.networks and "keypoint_image" in batch:
            out["wrong_pose_gap"] = gap("keypoint_image")
        return out

    return evaluate
