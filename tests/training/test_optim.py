"""Update rules against optax and against their definitions; schedules, clipping, weight decay, factors, the moving average."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from instantid_jax.training.config import OptimizerConfig
from instantid_jax.training.optim import ema_decay, learning_rate, make_optimizer

RNG = np.random.default_rng(0)
TREE = {
    "unet": {"proj": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)}},
    "norm": {"scale": RNG.normal(size=4).astype(np.float32)},
}
GRADIENTS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), TREE) for _ in range(4)]
MASK = {"unet": {"proj": {"kernel": True, "bias": False}}, "norm": {"scale": False}}


def run(optimizer, tree=None, gradients=None):
    """The weights after each update."""
    weights = jax.tree.map(jnp.asarray, TREE if tree is None else tree)
    state, path = optimizer.init(weights), []
    for gradient in GRADIENTS if gradients is None else gradients:
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        path.append(weights)
    return path


def same(found, wanted, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, wanted)


def of(**fields):
    return make_optimizer(OptimizerConfig(**{"learning_rate": 0.1, "clip_norm": None, "weight_decay": 0.1, **fields}), 10)


def test_adamw_is_its_definition():
    found = run(of(b1=0.8, b2=0.95, eps=1e-6))
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        w, m, v = TREE["unet"]["proj"][name].astype(np.float64), 0.0, 0.0
        for n, gradient in enumerate(GRADIENTS, 1):
            g = gradient["unet"]["proj"][name].astype(np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            w = w - 0.1 * (m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.95**n)) + 1e-6) + decay * w)
            np.testing.assert_allclose(found[n - 1]["unet"]["proj"][name], w, rtol=2e-5, atol=1e-6)


def test_lion_is_its_definition():
    found = run(of(name="lion", b1=0.9, b2=0.99))
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        w, m = TREE["unet"]["proj"][name].astype(np.float64), 0.0
        for n, gradient in enumerate(GRADIENTS):
            g = gradient["unet"]["proj"][name].astype(np.float64)
            w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + decay * w)
            m = 0.99 * m + 0.01 * g
            np.testing.assert_allclose(found[n]["unet"]["proj"][name], w, rtol=2e-5, atol=1e-6)


def test_adafactor_is_optax_s_without_its_decay():
    large = {"kernel": RNG.normal(size=(130, 140)).astype(np.float32), "bias": np.ones(7, np.float32)}
    gradients = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), large) for _ in range(3)]
    same(run(of(name="adafactor", weight_decay=0.0), large, gradients), run(optax.adafactor(0.1), large, gradients))


def test_adafactor_s_moments_are_factored_and_its_decay_is_scaled_by_the_learning_rate():
    large = {"kernel": np.full((130, 140), 2.0, np.float32), "bias": np.full(7, 2.0, np.float32)}
    optimizer = of(name="adafactor")
    assert sum(x.size for x in jax.tree.leaves(optimizer.init(large))) < 130 * 140 / 10
    zero = [jax.tree.map(np.zeros_like, large)]
    (found,) = run(optimizer, large, zero)
    np.testing.assert_allclose(found["kernel"], 2.0 * (1 - 0.1 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], 2.0)


def test_prodigy_is_optax_s_and_its_decay_spares_biases_and_norms():
    plain = optax.contrib.prodigy(1.0, betas=(0.9, 0.999), eps=1e-8)
    same(run(of(name="prodigy", learning_rate=1.0, weight_decay=0.0)), run(plain))
    decayed = run(optax.contrib.prodigy(1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5), gradients=GRADIENTS[:1])[-1]
    found = run(of(name="prodigy", learning_rate=1.0, weight_decay=0.5), gradients=GRADIENTS[:1])[-1]
    untouched = run(plain, gradients=GRADIENTS[:1])[-1]
    same(found["unet"]["proj"]["kernel"], decayed["unet"]["proj"]["kernel"])
    same((found["unet"]["proj"]["bias"], found["norm"]), (untouched["unet"]["proj"]["bias"], untouched["norm"]))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_weight_decay_leaves_biases_norms_and_embeddings(name):
    tree = {"a": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}, "b": {"scale": np.ones(2, np.float32)}}
    tree |= {"c": {"embedding": np.ones((3, 2), np.float32)}, "latents": np.ones((1, 2), np.float32)}
    found = run(of(name=name, weight_decay=0.5), tree, [jax.tree.map(np.zeros_like, tree)])[-1]
    np.testing.assert_allclose(found["a"]["kernel"], 0.95)
    found["a"].pop("kernel")
    assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves(found))


def test_clipping_is_by_the_global_norm_and_before_the_rule():
    gradient = {"x": np.array([3.0, 0.0], np.float32), "y": np.array([4.0], np.float32)}
    optimizer = of(clip_norm=1.0, eps=10.0, weight_decay=0.0)  # a large eps makes the step proportional to the gradient
    state = optimizer.init(gradient)
    updates, _ = optimizer.update(gradient, state, gradient)
    wanted, _ = of(clip_norm=None, eps=10.0, weight_decay=0.0).update(jax.tree.map(lambda g: g / 5, gradient), state[1:], gradient)
    same(updates, wanted)
    small = jax.tree.map(lambda g: g / 10, gradient)  # norm 0.5: not touched
    same(optimizer.update(small, state, gradient)[0], of(clip_norm=None, eps=10.0, weight_decay=0.0).update(small, state[1:], gradient)[0])


def test_factors_by_path_the_first_match_counts():
    plain = run(of(weight_decay=0.0), gradients=GRADIENTS[:1])[-1]
    found = run(of(weight_decay=0.0, multipliers=((r"^unet/.*bias$", 0.0), (r"^unet/", 3.0))), gradients=GRADIENTS[:1])[-1]
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, plain, TREE)
    again = jax.tree.map(lambda a, b: np.asarray(a) - b, found, TREE)
    np.testing.assert_allclose(again["unet"]["proj"]["kernel"], 3 * moved["unet"]["proj"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(again["unet"]["proj"]["bias"], 0)
    np.testing.assert_allclose(again["norm"]["scale"], moved["norm"]["scale"], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"schedule": "constant"}, {0: 2.0, 50: 2.0, 100: 2.0}),
        ({"schedule": "constant", "warmup": 9}, {0: 0.2, 4: 1.0, 9: 2.0, 100: 2.0}),
        ({"schedule": "cosine"}, {0: 2.0, 25: 1 + math.cos(math.pi / 4), 50: 1.0, 100: 0.0}),
        ({"schedule": "cosine", "final": 0.1}, {50: 1.1, 100: 0.2, 150: 0.2}),
        ({"schedule": "linear", "warmup": 20}, {19: 40 / 21, 20: 2.0, 60: 1.0, 100: 0.0}),
        ({"schedule": "linear", "warmup": 20, "hold": 0.5}, {20: 2.0, 60: 2.0, 80: 1.0, 100: 0.0}),
    ],
)
def test_schedules(fields, wanted):
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, **fields), 100)
    for step, value in wanted.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup 11 is longer than the run of 10 steps"):
        learning_rate(OptimizerConfig(warmup=11), 10)


def test_the_average_s_memory_grows_to_its_limit():
    counts = jnp.array([0, 9, 90, 10**6])
    np.testing.assert_allclose([ema_decay(0.99, n) for n in counts], [0.1, 10 / 19, 0.91, 0.99], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "prodigy"])
def test_an_update_that_is_not_good_leaves_the_state(name):
    optimizer = of(name=name)
    weights = jax.tree.map(jnp.asarray, TREE)
    _, state = optimizer.update(GRADIENTS[0], optimizer.init(weights), weights)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), TREE)
    _, after = optimizer.update(broken, state, weights, good=jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_adamw_s_update_needs_no_memory_of_the_weights_size():
    """On a CPU too, whose compiler would copy the old moments (2.5 times the weights here)."""
    optimizer, side = of(clip_norm=1.0), 512
    weights = {"kernel": jax.ShapeDtypeStruct((side, side), jnp.float32)}

    def step(weights, state, gradient):
        updates, state = optimizer.update(gradient, state, weights, good=jnp.isfinite(optax.tree.norm(gradient)))
        return optax.apply_updates(weights, updates), state

    state = jax.eval_shape(optimizer.init, weights)
    plan = jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, weights).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * side * side / 8
