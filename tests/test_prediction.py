"""What the denoising program computes in each call and what it leaves out, on a network of two levels."""

import functools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantid_jax import denoise as programs
from instantid_jax.config import ComputeConfig, IdentityNetConfig, SchedulerConfig, UNetConfig
from instantid_jax.defaults import _random_parameters
from instantid_jax.denoise import Conditions, Denoiser
from instantid_jax.diffusion import control_window, make_sampler
from instantid_jax.models import Network
from instantid_jax.models.adapter import Adapter
from instantid_jax.models.encoder import AddedConditions, IdentityContext
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.models.unet import Residuals
from instantid_jax.models.unet import UNet as UNetModule
from instantid_jax.parallel.flops import count_flops, executed_flops
from instantid_jax.prediction import Pace, Shortcuts, plan_calls
from instantid_jax.strengths import adapter_places, control_places, read_strength

CALLS, SIDE, WIDTH, TOKENS = 5, 8, 40, 16
UNET = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(2, 2),
    cross_attention_dim=WIDTH,
    norm_num_groups=8,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=60,
)
NETWORKS = {
    "unet": Network(UNetModule, UNET, ComputeConfig()),
    "adapter": Network(Adapter, UNET, ComputeConfig()),
    "identitynet": Network(IdentityNet, IdentityNetConfig.from_unet(UNET, (8, 8, 8, 8)), ComputeConfig()),
}
DENOISER = Denoiser(NETWORKS["unet"], NETWORKS["adapter"], NETWORKS["identitynet"])
SAMPLER = make_sampler("euler", SchedulerConfig())
PLAN = SAMPLER.plan(CALLS)
EXACT = Shortcuts()
PER_ROW = ("text", "added", "identity_tokens")
ALL = Shortcuts(cache_branch=1, keep_control=True, guidance_window=True)


class Case(NamedTuple):
    conditions: Conditions
    noise: np.ndarray
    scale: float


@functools.cache
def weights() -> dict[str, Any]:
    return {name: _random_parameters(NETWORKS[name], 0) for name in ("unet", "adapter", "identitynet")} | {"controlnets": ()}


def case(start: float = 0.0, end: float = 1.0, halves: int = 2) -> Case:
    draw = np.random.default_rng(3).standard_normal
    both = {
        "text": draw((2, 77, WIDTH), np.float32),
        "pooled": draw((2, UNET.pooled_dim), np.float32),
        "tokens": draw((2, TOKENS, WIDTH), np.float32),
    }
    x = {name: jnp.asarray(array[-halves:]) for name, array in both.items()}
    sizes = jnp.full((halves, 6), 64.0)
    window = control_window(CALLS, start, end)
    conditions = Conditions(
        text=x["text"],
        text_mask=None,
        added=AddedConditions(x["pooled"], sizes),
        identity_tokens=x["tokens"],
        images=(jnp.asarray(np.clip(draw((1, 8 * SIDE, 8 * SIDE, 3), np.float32), 0, 1)),),
        control_scales=jnp.asarray(0.8 * window)[:, None],
        adapter_scale=jnp.full((CALLS,), 0.7),
        control_mask=None,
    )
    return Case(conditions, draw((1, SIDE, SIDE, 4), np.float32), 4.0)


def pace(cache: int = 1, control: int = 1, guidance: Any = True) -> Pace:
    return Pace(jnp.int32(cache), jnp.int32(control), jnp.broadcast_to(jnp.asarray(guidance), (CALLS,)))


def arguments(c: Case, shortcuts: Shortcuts, speed: Pace | None) -> tuple[Any, ...]:
    seeds = np.zeros(1, np.uint32)
    dynamic = weights(), c.conditions, jnp.asarray(c.noise) * PLAN.init_noise_sigma, seeds, PLAN, jnp.float32(c.scale), jnp.float32(0)
    return dynamic, shortcuts, speed


def call(guided: bool, dynamic: Any, shortcuts: Shortcuts, speed: Pace | None) -> jax.Array:
    return programs.denoise(DENOISER, SAMPLER, guided, *dynamic, speed, None, shortcuts)


def run(c: Case, shortcuts: Shortcuts = EXACT, speed: Pace | None = None, guided: bool = True) -> np.ndarray:
    return np.asarray(call(guided, *arguments(c, shortcuts, speed)))


def traced(c: Case, shortcuts: Shortcuts = EXACT, speed: Pace | None = None) -> tuple[Any, list[Any]]:
    dynamic, shortcuts, speed = arguments(c, shortcuts, speed)
    jaxpr = jax.make_jaxpr(lambda dynamic, speed: call(True, dynamic, shortcuts, speed))(dynamic, speed)
    return jaxpr, jax.tree.leaves((dynamic, speed))


def flops(c: Case, shortcuts: Shortcuts = EXACT, speed: Pace | None = None) -> float:
    return executed_flops(*traced(c, shortcuts, speed))


def equations(jaxpr: Any) -> Any:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
                yield from equations(value)


# --- what is computed once, and where the program goes


def test_the_loop_computes_nothing_that_stays_the_same_and_never_leaves_the_device() -> None:
    jaxpr, _ = traced(case())
    whole = list(equations(jaxpr))
    (loop,) = [
        e for e in whole if e.primitive.name == "scan" and e.params["length"] == CALLS and any(map(is_convolution, equations(e.params["jaxpr"])))
    ]
    inside = list(equations(loop.params["jaxpr"]))

    def shapes(found: list[Any]) -> set[tuple[int, ...]]:
        return {tuple(v.aval.shape) for e in found if is_product(e) for v in e.invars}

    # Text and identity as contexts, the control picture, the size conditions: in the program, but not in its loop.
    constant = [(2, 77, WIDTH), (2, TOKENS, WIDTH), (1, 8 * SIDE, 8 * SIDE, 3), (2, UNET.projection_class_embeddings_input_dim)]
    assert all(shape in shapes(whole) and shape not in shapes(inside) for shape in constant)
    names = {e.primitive.name for e in whole}
    assert not any("callback" in name or "infeed" in name or "outfeed" in name or name == "device_put" for name in names)


def is_convolution(equation: Any) -> bool:
    return equation.primitive.name == "conv_general_dilated"


def is_product(equation: Any) -> bool:
    return is_convolution(equation) or equation.primitive.name == "dot_general"


def test_both_halves_of_guidance_are_one_batch_and_the_noise_is_used_up() -> None:
    jaxpr, _ = traced(case())
    inputs = [e for e in equations(jaxpr) if is_convolution(e) and e.invars[0].aval.shape[1:] == (SIDE, SIDE, 4)]
    assert {e.invars[0].aval.shape[0] for e in inputs} == {2} and len(inputs) == 2  # one of the UNet, one of IdentityNet
    dynamic, *rest = arguments(case(), EXACT, None)
    call(True, dynamic, *rest)
    assert dynamic[2].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(dynamic[1]))


# --- strengths are traced


def test_a_thousand_schedules_compile_one_program() -> None:
    """One without names of layers, and one with them."""
    draw, nets, c = random.Random(0), (control_places(UNET), adapter_places(UNET)), case(halves=1)

    def text() -> str:
        a, b, until = draw.uniform(-1, 2), draw.uniform(-1, 2), draw.uniform(0.1, 0.9)
        listed = [a, *(draw.uniform(-1, 2) for _ in range(CALLS - 1))]
        return draw.choice([f"{a}", f"linear({a}, {b})", f"cosine({a}, {b})", f"{listed}", f"{a} until {until} then linear({b}, 0)"])

    for count, named in ((1000, ""), (100, ", mid={}, up0.1={}")):
        found, first, compiled = set(), 0, []

        def listen(event: str, duration: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)  # noqa: B023 (used within the pass alone)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for _ in range(count):
                own = read_strength(text() + named.format(text(), text())).table(range(CALLS), nets[1])
                control = read_strength(text()).table(range(CALLS), nets[0])[:, None]
                conditions = c.conditions._replace(control_scales=jnp.asarray(control), adapter_scale=jnp.asarray(own))
                found.add(run(c._replace(conditions=conditions), guided=False).tobytes())
                first = first or len(compiled)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert len(compiled) == first > 0 and len(found) == count


# --- nothing left out: the exact program's numbers


def test_shortcuts_that_leave_nothing_out_change_nothing() -> None:
    np.testing.assert_array_equal(run(case(), ALL, pace()), run(case()))


def test_outside_the_guidance_window_is_the_picture_without_guidance() -> None:
    unguided = run(case(halves=1), guided=False)
    np.testing.assert_array_equal(run(case(), ALL, pace(guidance=False)), unguided)
    partly = run(case(), ALL, pace(guidance=jnp.arange(CALLS) < 3))
    assert np.abs(partly - unguided).max() > 1e-3 and np.abs(partly - run(case())).max() > 1e-3


@pytest.mark.parametrize("branch", [0, UNET.num_skips - 2, UNET.num_skips - 1])
def test_the_outer_layers_with_features_of_the_same_input_are_the_whole_network(branch: int) -> None:
    c = case()

    @jax.jit
    def both(weights: Any, sample: jax.Array) -> Any:
        unet, net = (NETWORKS[name].bind(weights[name]) for name in ("unet", "identitynet"))
        time, control_time = (n.embed_time(jnp.float32(500), c.conditions.added, 2) for n in (unet, net))
        text, tokens = unet.project_context(c.conditions.text), net.project_context(c.conditions.identity_tokens)
        feature = jnp.broadcast_to(net.embed_condition(c.conditions.images[0]), (2, SIDE, SIDE, 16))
        keys_values = NETWORKS["adapter"].bind(weights["adapter"])(c.conditions.identity_tokens)
        identity = IdentityContext(keys_values, jnp.float32(0.7))
        residuals = net.residuals(sample, control_time, tokens, feature)
        outer = net.outer_residuals(sample, control_time, tokens, feature, branch + 1)
        whole, deep = unet.predict_whole(sample, time, text, branch, identity=identity, residuals=residuals)
        shallow = unet.predict_outer(sample, time, text, branch, deep, identity=identity, residuals=outer)
        plain = unet.predict(sample, time, text, identity=identity, residuals=Residuals(residuals.down, residuals.mid))
        return whole, shallow, plain

    sample = jnp.concatenate([jnp.asarray(c.noise)] * 2)
    whole, shallow, plain = (np.asarray(a) for a in both(weights(), sample))
    np.testing.assert_allclose(whole, plain, atol=1e-6)
    np.testing.assert_allclose(shallow, plain, atol=1e-6)


# --- something left out: a plain loop with a memory gives the same


@functools.partial(jax.jit, static_argnames=("whole", "fresh"))
def one_call(weights: Any, c: Conditions, x: jax.Array, t: jax.Array, scale: jax.Array, deep: Any, kept: Any, whole: bool, fresh: bool) -> Any:
    """Output, deep features and residuals of a call; both halves of the conditions or one."""
    unet, net, adapter = (NETWORKS[name].bind(weights[name]) for name in ("unet", "identitynet", "adapter"))
    batch, branch = len(c.text), ALL.cache_branch
    assert branch is not None
    x = jnp.concatenate([x] * batch)
    if fresh:
        feature = jnp.concatenate([net.embed_condition(c.images[0])] * batch)
        new = net(x, t, net.project_context(c.identity_tokens), c.added, feature)
        new = [*new.down, new.mid]
        kept = new if whole else [*new[: branch + 1], *kept[branch + 1 :]]
    scaled = [r * scale for r in kept]
    time, text = unet.embed_time(t, c.added, batch), unet.project_context(c.text)
    identity = IdentityContext(adapter(c.identity_tokens), c.adapter_scale[0])
    if whole:
        output, deep = unet.predict_whole(x, time, text, branch, identity=identity, residuals=Residuals(scaled[:-1], scaled[-1]))
    else:
        output = unet.predict_outer(x, time, text, branch, deep, identity=identity, residuals=scaled[: branch + 1])
    return output, deep, kept


def plain_loop(c: Case, cache: int, control: int, guided: np.ndarray) -> np.ndarray:
    """Cached denoising, written again without branches: decisions are Python's, one call after the other."""
    state, deep, kept, waits = SAMPLER.init(jnp.asarray(c.noise) * PLAN.init_noise_sigma), None, None, False
    halves = c.conditions, c.conditions._replace(**jax.tree.map(lambda a: a[1:], {k: getattr(c.conditions, k) for k in PER_ROW}))
    first = int(np.argmax(np.asarray(c.conditions.control_scales[:, 0]) != 0))
    for i in range(CALLS):
        row = {name: column[i] for name, column in PLAN.rows.items()}
        scale = c.conditions.control_scales[i, 0]
        begins = i > 0 and guided[i] and not guided[i - 1]
        whole = bool(i % cache == 0 or begins or i == first)
        waits = waits or bool(scale != 0 and ((i - first) % control == 0 or begins))  # for a call that computes the inner residuals
        fresh = kept is None or bool(scale != 0 and ((i - first) % control == 0 or begins or (whole and waits)))
        waits = waits and not (whole and scale != 0)
        if not guided[i] and deep is not None and len(deep) == 2:
            deep, kept = jax.tree.map(lambda a: a[1:], (deep, kept))
        x = SAMPLER.model_input(state, row)
        t = jnp.asarray(row["timestep"])
        output, deep, kept = one_call(weights(), halves[0 if guided[i] else 1], x, t, scale, deep, kept, whole, fresh)
        output = output[:1] + c.scale * (output[1:] - output[:1]) if guided[i] else output
        state = SAMPLER.step(state, output, row, None)
    return np.asarray(state.sample)


@pytest.mark.parametrize(
    ("cache", "control", "guided", "start"),
    [
        (3, 2, (1, 1, 1, 0, 0), 0.0),
        pytest.param(4, 1, (0, 0, 1, 1, 0), 0.3, marks=pytest.mark.slow),
        pytest.param(2, 2, (1, 1, 1, 1, 1), 0.15, marks=pytest.mark.slow),
    ],
)
def test_shortcuts_against_a_plain_loop(cache: int, control: int, guided: tuple[int, ...], start: float) -> None:
    c, wanted = case(start=start), np.asarray(guided, bool)
    ours = run(c, ALL, pace(cache, control, wanted))
    expected = plain_loop(c, cache, control, wanted)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(ours - run(c)).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("cache", "control", "strengths", "guided_from", "whole", "net"),
    [
        (3, 2, "111111111", 0, "100100100", "201210201"),
        (3, 3, "011111111", 0, "110100100", "020010210"),  # a net's first call is whole, whatever the intervals
        (4, 9, "001110011", 0, "101010001", "002000000"),
        (9, 9, "011101110", 4, "110010000", "020001000"),  # guidance begins where the net rests: it runs when it acts again
        (1, 2, "111111111", 0, "111111111", "202020202"),
    ],
)
def test_a_net_whose_turn_was_between_whole_calls_is_whole_in_the_next(
    cache: int, control: int, strengths: str, guided_from: int, whole: str, net: str
) -> None:
    scales = jnp.asarray([[float(s)] for s in strengths])
    paced = Pace(jnp.int32(cache), jnp.int32(control), jnp.arange(len(scales)) >= guided_from)
    calls = plan_calls(ALL, paced, (), scales, jnp.ones(len(scales)))
    assert "".join(str(int(w)) for w in calls.whole) == whole
    assert "".join(map(str, calls.control[:, 0, 0])) == net


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.booleans(), min_size=12, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
@settings(deadline=None, max_examples=200)
def test_a_net_acts_with_no_residuals_that_were_never_computed(cache: int, control: int, acts: list[bool], guided: list[bool]) -> None:
    paced = Pace(jnp.int32(cache), jnp.int32(control), jnp.asarray(guided))
    calls = plan_calls(ALL, paced, (), jnp.asarray(acts, jnp.float32)[:, None], jnp.ones(12))
    runs, whole = np.asarray(calls.control[:, 0, 0]), np.asarray(calls.whole)
    inner = outer = -100  # calls of which the residuals are
    begun = 0
    for i, acting in enumerate(acts):
        begun = i if i and guided[i] and not guided[i - 1] else begun
        assert acting or runs[i] == 0
        assert runs[i] != 2 or whole[i]
        inner, outer = (i if runs[i] == 2 else inner), (i if runs[i] else outer)
        if acting:
            assert outer >= begun and i - outer < control
        if acting and whole[i]:
            assert inner >= begun


# --- what is left out is not computed


def test_identitynet_is_not_computed_outside_its_window() -> None:
    one = flops(case(end=0.6)) - flops(case(end=0.4))
    assert flops(case()) - flops(case(end=0.4)) == pytest.approx(3 * one, rel=1e-12)
    net = NETWORKS["identitynet"]

    def alone(weights: Any, tokens: jax.Array, feature: jax.Array) -> Any:
        module = net.bind(weights)
        context = module.project_context(tokens)
        return context, module.residuals(jnp.zeros((2, SIDE, SIDE, 4)), jnp.zeros((2, UNET.time_embed_dim)), context, feature)

    given = weights()["identitynet"], case().conditions.identity_tokens, jnp.zeros((2, SIDE, SIDE, 16))
    projected = jax.make_jaxpr(lambda w, tokens: net.bind(w).project_context(tokens))(*given[:2])
    assert one == count_flops(jax.make_jaxpr(alone)(*given)) - count_flops(projected)


def test_the_unconditional_half_is_not_computed_outside_the_guidance_window() -> None:
    shortcuts = Shortcuts(guidance_window=True)
    counts = [flops(case(), shortcuts, pace(guidance=jnp.arange(CALLS) < n)) for n in range(CALLS + 1)]
    assert counts[-1] == flops(case())
    steps = np.diff(counts)
    np.testing.assert_array_equal(steps, steps[0])
    before = counts[0] - CALLS * steps[0]  # what is computed once; every call costs once or twice the same
    assert 0 < before < 0.1 * counts[-1]


def test_cached_calls_compute_the_outer_layers_alone() -> None:
    exact = flops(case())
    by_interval = [flops(case(), Shortcuts(cache_branch=0), pace(cache)) for cache in (1, 2, 3, 5)]
    assert by_interval[0] == exact and sorted(by_interval, reverse=True) == by_interval
    whole, saved = exact / CALLS, exact - by_interval[1]
    assert by_interval[3] == pytest.approx(exact - 2 * saved, rel=1e-12)  # four calls cached instead of two
    assert saved > 1.6 * whole * 0.9
    kept = [flops(case(), Shortcuts(keep_control=True), pace(control=n)) for n in (1, 2, 5)]
    assert kept[0] == exact and exact - kept[2] == pytest.approx(2 * (exact - kept[1]), rel=1e-12)
