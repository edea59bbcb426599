"""One step on networks of one line: accumulation, guard, update, moving average, what is told."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from instantid_jax.training.config import LossConfig, StageConfig
from instantid_jax.training.objectives import draw, per_sample
from instantid_jax.training.optim import make_optimizer
from instantid_jax.training.state import initial_state, merge, split
from instantid_jax.training.step import make_evaluation, make_step

NO_LIMIT = np.float32(np.inf)


@functools.cache
def setup(loss=None, stage=fakes.BASE, **fields):
    """(step, state, frozen weights, objective); equal ones are compiled once."""
    objective, weights, _ = fakes.objective(loss, stage)
    config = small.recipe("out", "weights", stage=stage, loss=loss or LossConfig(), **fields)
    optimizer = make_optimizer(config.optimizer, config.steps)
    trained, frozen = split(weights, stage)
    state = initial_state(trained, optimizer, ema=config.optimizer.ema is not None)
    return jax.jit(make_step(objective, config, optimizer)), state, frozen, objective


def close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-6, "atol": 1e-7, **kwargs}), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("parts", "loss"), [(2, None), (8, None), (4, LossConfig(noise_offset=0.1, input_perturbation=0.1, weighting="min_snr"))])
def test_accumulated_parts_are_the_large_batch(parts, loss):
    whole, state, frozen, _ = setup(loss)
    split_up, _, _, _ = setup(loss, optimizer__accumulate=parts)
    a, told = whole(state, frozen, fakes.batch(), NO_LIMIT)
    b, again = split_up(state, frozen, fakes.batch(), NO_LIMIT)
    close(a, b)
    close(told, again, rtol=2e-6)  # sample losses too: the rows are in the batch's order


def test_the_update_is_the_gradient_s():
    step, state, frozen, objective = setup()
    batch = fakes.batch()
    draws = draw(objective, jax.random.fold_in(jax.random.key(0), 0), batch)
    value, gradient = jax.value_and_grad(lambda w: per_sample(objective, merge(w, frozen), batch, draws).loss.mean())(state.parameters)
    after, told = step(state, frozen, batch, NO_LIMIT)
    np.testing.assert_allclose(told.loss, value, rtol=1e-6)
    np.testing.assert_allclose(told.gradient_norm, np.sqrt(sum(float(g) ** 2 for g in jax.tree.leaves(gradient))), rtol=1e-5)
    # Adam's first step is the learning rate times the gradient's sign.
    wanted = jax.tree.map(lambda w, g: w - 1e-3 * (np.sign(g) + 0.01 * w), state.parameters, gradient)
    close(after.parameters, wanted, rtol=1e-5)
    assert (after.step, after.updates, bool(told.good)) == (1, 1, True)
    np.testing.assert_allclose(told.learning_rate, 1e-3)


def test_the_norm_is_told_before_clipping_and_the_update_is_clipped():
    _, state, frozen, _ = setup()
    sgd = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    objective, config = fakes.objective()[0], small.recipe("out", "weights", stage=fakes.BASE, optimizer__ema=None)
    state = initial_state(state.parameters, sgd, ema=False)
    after, told = jax.jit(make_step(objective, config, sgd))(state, frozen, fakes.batch(), NO_LIMIT)
    moved = jax.tree.map(lambda a, b: a - b, after.parameters, state.parameters)
    assert told.gradient_norm > 0.01
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)


def test_the_moving_average():
    step, state, frozen, _ = setup(optimizer__ema=0.15)
    average, weights = state.ema, state.parameters
    for n in range(3):
        state, _ = step(state, frozen, fakes.batch(), NO_LIMIT)
        decay = min(0.15, (1 + n) / (10 + n))
        average = jax.tree.map(lambda e, w, d=decay: d * e + (1 - d) * w, average, state.parameters)
        close(state.ema, average)
    assert not np.allclose(jax.tree.leaves(state.ema), jax.tree.leaves(weights))


def test_without_an_average_there_is_none():
    step, state, frozen, _ = setup(optimizer__ema=None)
    assert step(state, frozen, fakes.batch(), NO_LIMIT)[0].ema == {}


@pytest.mark.parametrize(("where", "value"), [("latent_mean", np.nan), ("latent_mean", np.inf), ("embedding", np.nan)])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(where, value):
    step, state, frozen, _ = setup(LossConfig(identity_weight=0.1))
    state, _ = step(state, frozen, fakes.batch(), NO_LIMIT)
    bad = fakes.batch()
    bad[where][3] = value
    after, told = step(state, frozen, bad, NO_LIMIT)
    assert not told.good and int(after.step) == 2 and int(after.updates) == 1
    equal(after._replace(step=state.step), state)
    assert [i for i, x in enumerate(told.sample_loss) if not np.isfinite(x)] == [3]
    good, told = step(after, frozen, fakes.batch(), NO_LIMIT)
    assert told.good and int(good.updates) == 2 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(good))


def test_a_loss_above_the_limit_changes_nothing():
    step, state, frozen, _ = setup()
    _, told = step(state, frozen, fakes.batch(), NO_LIMIT)
    loss = np.float32(told.loss)
    after, told = step(state, frozen, fakes.batch(), np.nextafter(loss, np.float32(0)))
    assert not told.good
    equal(after.parameters, state.parameters)
    _, told = step(state, frozen, fakes.batch(), loss)
    assert told.good


def test_losses_by_noise_level():
    step, state, frozen, objective = setup(log__bucket_count=3)
    batch = fakes.batch()
    rows = per_sample(objective, merge(state.parameters, frozen), batch, draw(objective, jax.random.fold_in(jax.random.key(0), 0), batch))
    _, told = step(state, frozen, batch, NO_LIMIT)
    bucket = np.floor(np.asarray(rows.time) * 3).astype(int)
    np.testing.assert_array_equal(told.bucket_count, np.bincount(bucket, minlength=3))
    np.testing.assert_allclose(told.bucket_loss, np.bincount(bucket, np.asarray(rows.plain), 3), rtol=1e-5)
    np.testing.assert_allclose(told.sample_loss, rows.loss, rtol=1e-5)


def test_noise_follows_from_seed_and_step_alone():
    step, state, frozen, _ = setup()
    other, _, _, _ = setup(seed=1)
    losses = [step(state._replace(step=jnp.int32(n)), frozen, fakes.batch(), NO_LIMIT)[1].loss for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert other(state, frozen, fakes.batch(), NO_LIMIT)[1].loss != losses[0]


def test_evaluation_tells_what_the_wrong_person_and_the_wrong_pose_cost():
    objective, weights, _ = fakes.objective(stage=StageConfig())

    class Copying(fakes.FakeUNet):
        def __call__(self, sample, time, context, added, *, identity, residuals):
            return sample * 0 + identity.keys_values.mean((1, 2))[:, None, None, None] + residuals

    class Pose(fakes.FakeIdentityNet):
        def __call__(self, sample, time, context, added, condition):
            return condition.mean((1, 2, 3))[:, None, None, None]

    objective.networks["unet"].bind = lambda w: Copying(w, {})
    objective.networks["identitynet"].bind = lambda w: Pose({})
    trained, frozen = split(weights, StageConfig())
    batch = fakes.batch()
    evaluate = make_evaluation(objective)
    told = evaluate(trained, frozen, batch, fakes.key())
    swapped = {name: np.roll(batch[name], 1, axis=0) for name in ("embedding", "keypoint_image")}
    for name, gap in (("embedding", "wrong_person_gap"), ("keypoint_image", "wrong_pose_gap")):
        other = evaluate(trained, frozen, batch | {name: swapped[name]}, fakes.key())["loss"]
        np.testing.assert_allclose(told[gap], other - told["loss"], rtol=1e-4, atol=1e-6)
        assert told[gap] != 0
    base = dataclasses.replace(StageConfig(), identitynet=False, adapter=False)
    objective, weights, _ = fakes.objective(stage=base)
    assert make_evaluation(objective)({}, weights, batch, fakes.key()).keys() == {"loss"}


def test_who_ignores_the_face_has_no_gap_whatever_the_identity_loss():
    """The embedding is the identity loss's target too: another one must not look like something that was learned."""
    objective, weights, _ = fakes.objective(loss=LossConfig(identity_weight=0.5), stage=StageConfig())

    class Blind(fakes.FakeUNet):
        def __call__(self, sample, time, context, added, *, identity, residuals):
            return sample * 0

    objective.networks["unet"].bind = lambda w: Blind(w, {})
    trained, frozen = split(weights, StageConfig())
    told = make_evaluation(objective)(trained, frozen, fakes.batch(), fakes.key())
    assert told["wrong_person_gap"] == told["wrong_pose_gap"] == 0 and told["loss"] > 0
