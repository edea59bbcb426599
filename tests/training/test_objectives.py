"""The losses against their definitions, worked out in NumPy on networks of one line."""

from types import SimpleNamespace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from instantid_jax.training.config import LossConfig, StageConfig
from instantid_jax.training.objectives import _crop, cosine, draw, draw_times, face_weights, per_sample


def clean(batch, draws):
    return fakes.SCALE * (batch["latent_mean"] + np.exp(-1.5) * np.asarray(draws["latent"], np.float64))


def noised(batch, draws):
    """(clean latents, noisy latents, alpha, sigma), float64."""
    bar = fakes.alpha_bar(draws["times"])[:, None, None, None]
    z = clean(batch, draws)
    return z, np.sqrt(bar) * z + np.sqrt(1 - bar) * np.asarray(draws["noise"], np.float64), np.sqrt(bar), np.sqrt(1 - bar)


def evaluate(loss=None, stage=fakes.BASE, prediction_type="epsilon"):
    objective, weights, seen = fakes.objective(loss, stage, prediction_type)
    batch = fakes.batch()
    draws = draw(objective, fakes.key(), batch)
    return batch, draws, per_sample(objective, weights, batch, draws), seen


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_velocity_are_predicted(kind):
    batch, draws, rows, _ = evaluate(prediction_type=kind)
    z, noisy, alpha, sigma = noised(batch, draws)
    target = np.asarray(draws["noise"]) if kind == "epsilon" else alpha * draws["noise"] - sigma * z
    wanted = np.mean((0.5 * noisy + 0.1 - target) ** 2, (1, 2, 3))
    np.testing.assert_allclose(rows.plain, wanted, rtol=1e-4)
    np.testing.assert_array_equal(rows.loss, rows.plain)
    np.testing.assert_allclose(rows.time, np.asarray(draws["times"]) / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({"weighting": "min_snr"}, lambda bar: np.minimum(bar / (1 - bar), 5) / (bar / (1 - bar))),
        ({"weighting": "min_snr", "min_snr_gamma": 1.0}, lambda bar: np.minimum(bar / (1 - bar), 1) / (bar / (1 - bar))),
        ({"weighting": "clipped_v"}, lambda bar: np.minimum(1 / bar, 8)),
    ],
)
def test_noise_levels_are_weighted(fields, weight):
    _, draws, rows, _ = evaluate(LossConfig(**fields))
    _, _, plain, _ = evaluate()
    np.testing.assert_array_equal(rows.plain, plain.plain)  # comparable between recipes
    np.testing.assert_allclose(rows.loss, rows.plain * weight(fakes.alpha_bar(draws["times"])), rtol=1e-4)


def test_min_snr_of_velocity():
    _, draws, rows, _ = evaluate(LossConfig(weighting="min_snr"), prediction_type="v_prediction")
    ratio = fakes.alpha_bar(draws["times"]) / (1 - fakes.alpha_bar(draws["times"]))
    np.testing.assert_allclose(rows.loss, rows.plain * np.minimum(ratio, 5) / (ratio + 1), rtol=1e-4)


def test_noise_offset_moves_whole_channels_and_is_predicted_too():
    batch, draws, rows, _ = evaluate(LossConfig(noise_offset=0.3))
    _, plain, _, _ = evaluate()
    offset = np.asarray(draws["noise"] - plain["noise"])
    assert np.ptp(offset, axis=(1, 2)).max() < 1e-5
    assert 0.15 < offset[:, 0, 0].std() < 0.45
    _, noisy, _, _ = noised(batch, draws)
    np.testing.assert_allclose(rows.loss, np.mean((0.5 * noisy + 0.1 - draws["noise"]) ** 2, (1, 2, 3)), rtol=1e-4)


def test_input_perturbation_is_in_the_input_and_not_in_the_target():
    batch, draws, rows, seen = evaluate(LossConfig(input_perturbation=0.2))
    _, noisy, _, sigma = noised(batch, draws)
    assert 0.19 < np.asarray(draws["perturbation"]).std() < 0.21
    wanted = noisy + sigma * np.asarray(draws["perturbation"])
    np.testing.assert_allclose(seen["sample"], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows.loss, np.mean((0.5 * wanted + 0.1 - draws["noise"]) ** 2, (1, 2, 3)), rtol=1e-4)


def test_times_are_uniform():
    times = np.asarray(draw_times(LossConfig(), fakes.key(), 20_000, 1000))
    assert times.min() == 0 and times.max() == 999
    assert stats.chisquare(np.bincount(times // 50, minlength=20)).pvalue > 1e-3


def test_stratified_times_fill_every_stratum_once():
    times = np.asarray(draw_times(LossConfig(timesteps="stratified"), fakes.key(), 50, 1000))
    np.testing.assert_array_equal(np.sort(times // 20), np.arange(50))
    assert not np.array_equal(np.argsort(times), np.arange(50))


@pytest.mark.parametrize(
    ("fields", "preferred"),
    [
        ({"timestep_bias": "earlier", "timestep_bias_portion": 0.2}, (0, 200)),
        ({"timestep_bias": "later", "timestep_bias_portion": 0.2}, (800, 1000)),
        ({"timestep_bias": "range", "timestep_bias_range": (300, 500)}, (300, 500)),
    ],
)
def test_preferred_times_are_as_much_likelier_as_asked(fields, preferred):
    times = np.asarray(draw_times(LossConfig(timestep_bias_factor=4.0, **fields), fakes.key(1), 40_000, 1000))
    inside = np.mean((times >= preferred[0]) & (times < preferred[1]))
    assert abs(inside - 4 * 200 / (4 * 200 + 800)) < 4 * np.sqrt(0.25 / 40_000)
    assert times.min() >= 0 and times.max() <= 999


def test_the_face_weighs_more_by_the_share_of_a_latent_pixel_that_it_covers():
    weights = face_weights(jnp.array([[4.0, 2.0, 10.0, 13.0]]), (1, 8, 8, 4), 2, 3.0)
    rows, columns = np.zeros(8), np.zeros(8)
    rows[1:6], rows[6] = 1, 0.5  # 2 to 13 pixels
    columns[2:5] = 1  # 4 to 10 pixels
    np.testing.assert_allclose(weights[0, :, :, 0], 1 + 3 * np.outer(rows, columns), rtol=1e-6)
    batch, draws, rows_of, _ = evaluate(LossConfig(face_weight=3.0))
    _, noisy, _, _ = noised(batch, draws)
    mask = np.asarray(face_weights(jnp.asarray(batch["face_box"]), noisy.shape, 2, 3.0), np.float64)
    error = (0.5 * noisy + 0.1 - draws["noise"]) ** 2
    np.testing.assert_allclose(rows_of.loss, (error * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * 4), rtol=1e-4)


@pytest.mark.parametrize(("kind", "power"), [("epsilon", 2.0), ("v_prediction", 2.0), ("epsilon", 1.0)])
def test_identity_loss_reads_the_predicted_clean_latent(kind, power):
    batch, draws, rows, _ = evaluate(LossConfig(identity_weight=0.7, identity_power=power), prediction_type=kind)
    _, noisy, alpha, sigma = noised(batch, draws)
    output = 0.5 * noisy + 0.1
    predicted = (noisy - sigma * output) / alpha if kind == "epsilon" else alpha * noisy - sigma * output
    read = predicted.mean((1, 2)) @ np.random.default_rng(5).normal(size=(4, 16))
    e = batch["embedding"]
    similarity = (read * e).sum(-1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(e, axis=-1)
    wanted = rows.plain + 0.7 * alpha[:, 0, 0, 0] ** power * (1 - similarity)
    np.testing.assert_allclose(rows.loss, wanted, rtol=1e-4)


def test_similarity_of_a_dropped_embedding_is_zero_and_has_a_gradient():
    value, gradient = jax.value_and_grad(lambda x: cosine(x, jnp.zeros((1, 3))).sum())(jnp.ones((1, 3)))
    assert value == 0 and np.all(np.isfinite(gradient))


def test_who_is_told_what():
    batch, draws, _, seen = evaluate(stage=StageConfig())
    tokens = 0.5 * batch["embedding"][:, None, :]
    net = seen["identitynet"]
    np.testing.assert_allclose(net["context"], tokens)
    np.testing.assert_allclose(net["condition"], batch["keypoint_image"].astype(np.float32) / 255)
    np.testing.assert_array_equal(net["sample"], seen["sample"])
    np.testing.assert_array_equal(net["time"], np.asarray(draws["times"], np.float32))
    np.testing.assert_array_equal(seen["context"], batch["text_states"])
    np.testing.assert_array_equal(seen["added"].text_embeds, batch["text_pooled"])
    np.testing.assert_array_equal(seen["added"].time_ids, batch["sizes"])
    assert seen["residuals"] == "residuals"
    np.testing.assert_allclose(seen["identity"][0], 0.5 * tokens)
    assert seen["identity"][1] == 1.0


def test_identitynet_may_read_the_text_and_see_nothing():
    objective, weights, seen = fakes.objective(stage=StageConfig(identitynet_context="text", adapter=False))
    batch = fakes.batch()
    del batch["keypoint_image"]
    per_sample(objective, weights, batch, draw(objective, fakes.key(), batch))
    np.testing.assert_array_equal(seen["identitynet"]["context"], batch["text_states"])
    assert seen["identitynet"]["condition"].shape == (8, 16, 16, 3) and not np.any(seen["identitynet"]["condition"])
    assert seen["identity"] is None


def test_no_gradient_reaches_the_autoencoder():
    objective, weights, _ = fakes.objective()
    objective.networks["vae"].bind = lambda w: type("Scaled", (), {"scale": staticmethod(lambda z: w["a"] * z)})
    batch = fakes.batch()
    draws = draw(objective, fakes.key(), batch)
    gradient = jax.grad(lambda w: per_sample(objective, w, batch, draws).loss.sum())(weights)
    assert gradient["vae"]["a"] == 0 and gradient["unet"]["a"] != 0


def test_the_autoencoder_s_loss():
    loss = LossConfig(kl_weight=1e-3, gradient_weight=0.5)
    objective, weights, _ = fakes.objective(loss, StageConfig(objective="reconstruct", trainable=(r"^vae/",)))
    objective = objective._replace(model=SimpleNamespace(vae=SimpleNamespace(downscale=1, latent_channels=1)))  # pyright: ignore
    batch = {"image": np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)}
    draws = draw(objective, fakes.key(), batch)
    rows = per_sample(objective, weights, batch, draws)
    image = batch["image"] / 127.5 - 1
    error = np.repeat(0.5 * image[..., :1] + np.exp(-1.0) * np.asarray(draws["latent"]), 3, -1) - image
    axes = (1, 2, 3)
    slopes = np.abs(np.diff(error, axis=1)).mean(axes) + np.abs(np.diff(error, axis=2)).mean(axes)
    divergence = 0.5 * np.sum((0.5 * image[..., :1]) ** 2 + np.exp(-2.0) - 1 + 2.0, axes)
    wanted = np.abs(error).mean(axes) + 0.3 * (error**2).mean(axes) + 0.5 * slopes + 1e-3 * divergence
    np.testing.assert_allclose(rows.loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(rows.plain, (error**2).mean(axes), rtol=1e-4)


def test_crops_lie_on_the_latent_grid_and_reach_every_place():
    picture = jnp.broadcast_to((jnp.arange(12)[:, None] * 100 + jnp.arange(8))[None, :, :, None], (400, 12, 8, 3))
    where = jax.random.uniform(fakes.key(), (400, 2))
    corners = {divmod(int(x), 100) for x in _crop(picture, where, 4, 2)[:, 0, 0, 0]}
    assert corners == {(row, column) for row in range(0, 9, 2) for column in range(0, 5, 2)}


def test_the_recogniser_learns_the_embedding_under_the_noise_of_the_time():
    objective, weights, _ = fakes.objective(stage=StageConfig(objective="recognize", trainable=(r"^recognizer/",)))
    batch = fakes.batch()
    draws = draw(objective, fakes.key(), batch)
    rows = per_sample(objective, weights, batch, draws)
    strength = np.asarray(draws["times"])[:, None, None, None] / 1000
    read = (clean(batch, draws) + 0.5 * strength * draws["noise"]).mean((1, 2)) @ np.asarray(weights["recognizer"]["a"])
    e = batch["embedding"]
    wanted = 1 - (read * e).sum(-1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(e, axis=-1)
    np.testing.assert_allclose(rows.loss, wanted, rtol=1e-4)


def test_shifted_pictures_come_in_again_on_the_other_side():
    stage = StageConfig(objective="recognize", trainable=(r"^recognizer/",))
    objective, weights, _ = fakes.objective(LossConfig(shift=2), stage)
    # What the fake reads does not depend on where things lie: one that does sees the pictures move.
    objective.networks["recognizer"] = fakes.Fake(lambda w: lambda latents: latents[:, 0, 0] @ w["a"])
    batch = fakes.batch()
    draws = draw(objective, fakes.key(), batch)
    by = np.asarray(draws["shift"])
    assert by.shape == (8, 2) and by.min() >= -2 and by.max() <= 2 and len(np.unique(by)) > 2
    strength = np.asarray(draws["times"])[:, None, None, None] / 1000
    moved = np.stack([np.roll(z, tuple(b), (0, 1)) for z, b in zip(clean(batch, draws), by, strict=True)])
    read = (moved + 0.5 * strength * draws["noise"])[:, 0, 0] @ np.asarray(weights["recognizer"]["a"])
    e = batch["embedding"]
    wanted = 1 - (read * e).sum(-1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(e, axis=-1)
    np.testing.assert_allclose(per_sample(objective, weights, batch, draws).loss, wanted, rtol=1e-4)
    plain, _, _ = fakes.objective(stage=stage)
    assert "shift" not in draw(plain, fakes.key(), batch)


def test_draws_are_for_the_whole_batch_and_by_the_key_alone():
    objective, _, _ = fakes.objective(LossConfig(noise_offset=0.1, input_perturbation=0.1))
    one, same, other = (draw(objective, fakes.key(n), fakes.batch(seed=seed)) for n, seed in ((0, 0), (0, 1), (1, 0)))
    assert one.keys() == {"latent", "noise", "times", "perturbation"} and all(len(x) == 8 for x in one.values())
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])
