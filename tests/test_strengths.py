"""Strengths: what the grammar reads, what becomes of it over calls and layers, and what the pipeline makes of it."""

import random
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantid_jax import Person
from instantid_jax import denoise as programs
from instantid_jax.config import sdxl, tiny
from instantid_jax.defaults import random_pipeline
from instantid_jax.diffusion import control_window
from instantid_jax.face import draw_kps
from instantid_jax.models import build_networks
from instantid_jax.models.adapter import site_numbers
from instantid_jax.parallel.flops import executed_flops
from instantid_jax.pipeline import InstantIDPipeline, PipelineError, check_call
from instantid_jax.strengths import StrengthError, adapter_places, control_places, number_or_text, read_strength

DOCS = (Path(__file__).parents[1] / "docs/strengths.md").read_text(encoding="utf-8")
TEN, SDXL = range(10), (control_places(sdxl().identitynet), adapter_places(sdxl().unet))
KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])
EMBEDDINGS = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)


def over(steps: Any, text: Any) -> list[float]:
    table = read_strength(text).table(steps, SDXL[1])
    assert table.dtype == np.float32 and table.shape == (len(steps), 1, 1)
    return [round(float(v), 6) for v in table[:, 0, 0]]


# --- over the steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.8, [0.8] * 10),
        ("-.5e0", [-0.5] * 10),
        ("1.0 until 0.5 then 0.2", [1] * 5 + [0.2] * 5),
        ("0 until 0.2 then 1 until 0.8 then 0", [0] * 2 + [1] * 6 + [0] * 2),
        ("1 until 0.55 then 0", [1] * 5 + [0] * 5),
        ("1 until 0.05 then 0", [0] * 10),
        ("linear(1, 0.1)", [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (" 0until 0.5then linear ( 1,0 ) ", [0] * 5 + [1, 0.75, 0.5, 0.25, 0]),
        ("cosine(0, 2)", [round(1 - np.cos(np.pi * i / 9), 6) for i in TEN]),
        ([1, 0, 2.5, 0, 0, 0, 0, 0, 0, 3], [1, 0, 2.5, 0, 0, 0, 0, 0, 0, 3]),
        (np.arange(10) / 8, (np.arange(10) / 8).tolist()),
        ("[1, 0, 0, 0, 0, 0, 0, 0, 0, -3]", [1, 0, 0, 0, 0, 0, 0, 0, 0, -3]),
    ],
    ids=str,
)
def test_over_the_steps(text: Any, expected: list[float]) -> None:
    assert over(TEN, text) == expected


def test_a_list_is_of_steps_and_a_curve_of_calls() -> None:
    plan = check_call(tiny(), prompt="x", num_inference_steps=3, sampler="heun").plan
    assert plan.steps == (0, 0, 1, 1, 2)
    assert over(plan.steps, [1, 0.5, 0]) == [1, 1, 0.5, 0.5, 0]
    assert over(plan.steps, "linear(1, 0)") == [1, 0.75, 0.5, 0.25, 0]
    assert over([0], "linear(1, 0)") == [1]


def test_a_schedule_and_a_window_are_multiplied() -> None:
    for steps in (1, 4, 7, 10, 30, 49, 50):
        for end in (0.3, 0.58, 2 / 3, 0.9):
            until = read_strength(f"1 until {end!r} then 0").table(range(steps), SDXL[0])
            np.testing.assert_array_equal(until[:, 0, 0], control_window(steps, 0.0, end))
        for start in (0.5, 0.2):
            if (start * steps).is_integer():
                table = read_strength(f"0 until {start!r} then 1").table(range(steps), SDXL[0])
                np.testing.assert_array_equal(table[:, 0, 0], control_window(steps, start, 1.0))
    asked = {"controlnet_conditioning_scale": "linear(1, 0)", "control_guidance_start": 0.2, "control_guidance_end": 0.8}
    control, adapter = check_call(tiny(), prompt="x", num_inference_steps=5, **asked).strengths(0.5)
    assert control[:, 0, 0, 0].tolist() == [0, 0.75, 0.5, 0.25, 0] and control.shape == (5, 1, 1, 1)
    assert adapter.tolist() == [[[0.5]]] * 5


# --- over the layers


def test_the_layers_are_those_of_the_networks() -> None:
    assert SDXL[0] == [*(f"down{i}.{j}" for i, n in enumerate((4, 3, 2)) for j in range(n)), "mid"]
    assert len(SDXL[1]) == 70 and SDXL[1][-10:] == ["mid"] * 10
    assert [SDXL[1].count(f"{part}{i}.{j}") for part, i, j in (("down", 1, 0), ("down", 2, 1), ("up", 0, 2), ("up", 1, 0))] == [2, 10, 10, 2]
    config = tiny()
    network = build_networks(config)["identitynet"].abstract
    assert len(control_places(config.identitynet)) == 1 + len(network["controlnet_down_blocks"])
    for path, place in zip(site_numbers(config.unet).values(), adapter_places(config.unet), strict=True):
        assert re.sub(r"_blocks?|/transformer.*|/attentions/0(?=/)", "", path).startswith(re.match(r"[a-z]+", place)[0])  # type: ignore[index]


def test_what_is_named_finer_counts_first() -> None:
    table = read_strength("0.5, up=0.1, up0.1=linear(1, 0), up0=0.2, mid=3").table(range(2), SDXL[1])
    found = {place: table[:, 0, i].tolist() for i, place in enumerate(SDXL[1])}
    assert found["down2.1"] == [0.5, 0.5] and found["mid"] == [3, 3] and found["up0.1"] == [1, 0]
    np.testing.assert_allclose([found["up0.0"], found["up0.2"], found["up1.1"]], [[0.2] * 2, [0.2] * 2, [0.1] * 2], rtol=1e-6)


def test_both_sides_of_a_mask() -> None:
    strength = read_strength("inside: down=0.8, mid=1, up=linear(1, 0); outside: 0.2")
    assert strength.table(range(3), SDXL[1], 2).shape == (3, 2, 70) and strength.table(range(3), SDXL[1], 2)[:, 1].max() == np.float32(0.2)
    assert read_strength(0.8).table(range(3), SDXL[1], 2).tolist() == [[[np.float32(0.8)], [0]]] * 3


# --- what is not read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'': a strength is needed: a number, or linear(from, to) or cosine(from, to) (at the end)"),
        ("linear(1 0)", "'linear(1 0)': ',' is needed (at '0', character 10)"),
        ("liner(1, 0)", "did you mean 'linear'? (at 'liner', character 1)"),
        ("1 until 0.5", "'then' is needed (at the end)"),
        ("1 until 1.5 then 0", "between 0 and 1, larger than the one before (at '1.5', character 9)"),
        ("1 until 0.5 then 2 until 0.5 then 0", "larger than the one before (at '0.5', character 26)"),
        ("1, 2", "a layer is needed: down, mid or up, or finer, as up0 or up0.1 (at '2', character 4)"),
        ("middle=1", "a layer is needed: down, mid or up, or finer, as up0 or up0.1 (at 'middle', character 1)"),
        ("1, up=1, up=2", "up is named twice (at 'up', character 10)"),
        ("up=1", "nothing is said of down1.0; name it, or begin with a strength for the rest: '0.8, up=1'"),
        (
            "1, up9=1",
            "there is no layer 'up9' here; did you mean 'up'?; there are down, down1, down2, up, up0, up1, mid, and finer ones such as down1.0",
        ),
        ("1, down0=1", "there is no layer 'down0' here"),
        ("inside: 1", "';' is needed (at the end)"),
        ("outside: 1; inside: 1", "did you mean 'inside'?"),
        ("[1, 2", "']' is needed (at the end)"),
        ("[1, linear(1, 0)]", "a number is needed (at 'linear', character 5)"),
        ("1 + 1", "nothing more is understood (at '+', character 3)"),
        ("__import__('os')", "a strength is needed: a number, or linear(from, to) or cosine(from, to)"),
        ("99", "a strength must be between -10 and 10 (at '99', character 1)"),
        ("1e999", "a strength must be between -10 and 10"),
        ("[1, 2]", "the list has 2 values for 10 steps; give one for each step"),
        ([1.0, 2.0], "the list has 2 values for 10 steps; give one for each step"),
        (11, "must be between -10 and 10, not 11"),
        (float("nan"), "must be a finite number, not nan"),
        (True, "must be a finite number, a list with one for each step, or a text such as 'linear(1, 0.3)', not True"),
        ({"up": 1}, "must be a finite number, a list with one for each step, or a text"),
        ([], "must be a finite number, a list with one for each step, or a text"),
        (["1", "2"], "must be a finite number, a list with one for each step, or a text"),
    ],
    ids=str,
)
def test_wrong_strengths_get_one_sentence(text: Any, message: str) -> None:
    with pytest.raises(StrengthError, match=re.escape(message)):
        read_strength(text).table(TEN, SDXL[1])
    with pytest.raises(PipelineError, match=r"^ip_adapter_scale .*" + re.escape(message.split("; there are ")[0])):
        check_call(sdxl(), prompt="x", ip_adapter_scale=text, num_inference_steps=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"controlnet_conditioning_scale": "down=1, mid=1, up=1"},
            "controlnet_conditioning_scale there is no layer 'up' here; there are down, down0,",
        ),
        ({"controlnet_conditioning_scale": [1, 2, 3]}, "controlnet_conditioning_scale has 3 values for 1 nets"),
        ({"identity_guidance_scale": -1}, "identity_guidance_scale must be between 0 and 100, not -1"),
        ({"negative_identity_noise": -1}, "negative_identity_noise must be between 0 and 10, not -1"),
        ({"negative_identity_seed": 0.5}, "negative_identity_seed must be a whole number, not 0.5"),
    ],
    ids=str,
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match="^" + re.escape(message)):
        check_call(tiny(), prompt="x", **arguments)


# --- the grammar of the docs is the parser's


def grammar() -> dict[str, str]:
    (block,) = re.findall(r"```ebnf\n(.*?)```", DOCS, re.S)
    rules = dict(re.findall(r"(\w+)\s*=\s(.*?) ;\n", block, re.S))
    source = (Path(__file__).parents[1] / "instantid_jax/strengths.py").read_text(encoding="utf-8").split('"""')[1]
    assert rules == dict(re.findall(r"^    (\w+)\s*=\s(.*?) ;\n", source, re.S | re.M))
    return rules


class Writer:
    """Texts that the grammar makes."""

    def __init__(self, seed: int) -> None:
        self.rules, self.draw, self.until = grammar(), random.Random(seed), 0.0

    def text(self) -> str:
        return self.rule("strength")

    def rule(self, name: str) -> str:
        if name == "digits":
            return str(self.draw.randrange(3))
        if name == "number":
            return self.draw.choice(["1", "-0.5", ".25", "2.", "+1e-1", "10", "0"])
        if name == "layer":  # without spaces in it; which there are is not the grammar's
            return self.sequence(self.rules[name]).replace(" ", "")
        return self.sequence(self.rules[name])

    def sequence(self, rule: str) -> str:
        return self.alternatives(iter(re.findall(r'"[^"]*"|\w+|[\[\](){}|]', rule)), "")

    def alternatives(self, tokens: Any, closing: str) -> str:
        branches: list[list[Any]] = [[]]
        for token in tokens:
            if token == closing:
                break
            if token == "|":
                branches.append([])
            elif token in "([{":
                inner, end = [], {"(": ")", "[": "]", "{": "}"}[token]
                depth = 1
                for t in tokens:
                    depth += (t == token) - (t == end)
                    if not depth:
                        break
                    inner.append(t)
                branches[-1].append((token, inner))
            else:
                branches[-1].append(token)
        return " ".join(filter(None, map(self.item, self.draw.choice(branches))))

    def item(self, item: Any) -> str:
        if isinstance(item, str):
            return item[1:-1] if item[0] == '"' else self.rule(item)
        kind, inner = item
        times = {"(": 1, "[": self.draw.randrange(2), "{": self.draw.randrange(3)}[kind]
        return " ".join(self.alternatives(iter(inner), "") for _ in range(times))


MEANING = re.compile(r"named twice|between 0 and 1, larger than the one before")  # what a grammar cannot say


def test_every_text_of_the_documented_grammar_is_read() -> None:
    read, writer = set(), Writer(0)
    for _ in range(3000):
        text = writer.text()
        try:
            read_strength(text)
            read.add(text)
        except StrengthError as error:
            assert MEANING.search(str(error)), f"{text}: {error}"
    assert len(read) > 700 and all(any(word in text for text in read) for word in ("outside", "until", "linear", "cosine", "[", "="))


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=40), st.lists(st.sampled_from(["1", "0.5", "until", "then", ",", "=", "up", "mid", "(", ")", "linear"])).map(" ".join))
)
def test_any_other_text_is_refused_in_one_sentence(text: str) -> None:
    try:
        table = read_strength(text).table(TEN, SDXL[1])
    except StrengthError as error:
        assert len(str(error)) < 400 + 2 * len(text)
    else:
        assert np.isfinite(table).all() and np.abs(table).max() <= 10


# --- in the pipeline


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


def make(pipe: InstantIDPipeline, **changes: Any) -> np.ndarray:
    given = {"image": draw_kps((64, 64), KPS), "image_embeds": EMBEDDINGS[0], "num_inference_steps": 3, "output_type": "latent"} | changes
    return pipe("a person", **given).images


def person(i: int, **changes: Any) -> Person:
    region = ((0, 0, 32, 64), (32, 0, 64, 64))[i]
    return Person(**{"image_embeds": EMBEDDINGS[i], "image": draw_kps((64, 64), KPS + 4 * i), "region": region} | changes)


def of_people(pipe: InstantIDPipeline, *people: Person, **changes: Any) -> np.ndarray:
    return make(pipe, **{"image": None, "image_embeds": None, "people": list(people), "max_people": 2} | changes)


class Compilations:
    """Counts them within it."""

    def __enter__(self) -> list[str]:
        self.found: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.found

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.found.append(event)

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


CONSTANTS = ("0.8", "0.8 until 0.5 then 0.8", "linear(0.8, 0.8)", "cosine(0.8, 0.8)", "[0.8, 0.8, 0.8]")


@pytest.mark.slow
def test_a_constant_gives_the_same_bits_however_it_is_written(pipe: InstantIDPipeline) -> None:
    expected = make(pipe, ip_adapter_scale=0.8, controlnet_conditioning_scale=0.8)
    for text in CONSTANTS:
        np.testing.assert_array_equal(make(pipe, ip_adapter_scale=text, controlnet_conditioning_scale=text), expected)
    pipe.set_ip_adapter_scale("linear(0.8, 0.8)")
    np.testing.assert_array_equal(make(pipe, controlnet_conditioning_scale=[[0.8] * 3]), expected)
    with pytest.raises(PipelineError, match=r"^scale 'x': a strength is needed"):
        pipe.set_ip_adapter_scale("x")
    pipe.set_ip_adapter_scale([1, 2])
    with pytest.raises(PipelineError, match=r"^the scale of set_ip_adapter_scale the list has 2 values for 3 steps"):
        make(pipe)
    pipe.set_ip_adapter_scale(0.5)
    layers = make(pipe, ip_adapter_scale="down=0.8, mid=0.8, up=0.8", controlnet_conditioning_scale="0.8, mid=0.8")
    np.testing.assert_allclose(layers, expected, atol=1e-5)


def test_other_schedules_compile_nothing_in_whole_calls(pipe: InstantIDPipeline) -> None:
    make(pipe, ip_adapter_scale=1.0)
    of_people(pipe, person(0), person(1, ip_adapter_scale="0.5, mid=1"))
    with Compilations() as compiled:
        make(pipe, ip_adapter_scale="linear(1, 0)", controlnet_conditioning_scale="1 until 0.5 then 0", negative_identity_noise=0.5)
        of_people(pipe, person(0, ip_adapter_scale="linear(1, 0)", identitynet_scale=[1, 0, 1]), person(1, ip_adapter_scale="1, up=0"))
    assert compiled == []


def test_one_strength_for_all_layers_stays_out_of_the_loop_over_blocks(pipe: InstantIDPipeline) -> None:
    """A schedule over steps is a scalar in each of them: no strength is an item of the loop over the transformer's blocks."""

    def items_of_blocks(strength: Any) -> set[tuple[int, ...]]:
        request = check_call(pipe.config, prompt="x", num_inference_steps=5, guidance_scale=1.0, ip_adapter_scale=strength)
        inputs = pipe.prepare(request, draw_kps((64, 64), KPS), EMBEDDINGS[0])
        denoiser, weights = pipe.denoiser()
        jaxpr = jax.make_jaxpr(lambda w, x: programs.denoise(denoiser, request.solver, False, w, *x))(weights, inputs)
        loops = [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] in (2, 3)]
        items = (v.aval.shape for e in loops for v in e.invars[e.params["num_consts"] + e.params["num_carry"] :])
        return {shape for shape in items if len(shape) == 1}

    assert items_of_blocks(0.8) == items_of_blocks("linear(1, 0)") == set()
    assert items_of_blocks("1, mid=0.5") == {(2,), (3,)}


def equations(jaxpr: Any) -> Any:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
                yield from equations(value)


def test_numbers_of_options_are_those_of_the_grammar() -> None:
    assert [number_or_text(text) for text in ("1", "-0.5", ".5", "1e-2", " 2 ")] == [1.0, -0.5, 0.5, 0.01, 2.0]
    for text in ("1_0", "\uff11", "nan", "inf", "0x1", ""):
        with pytest.raises(StrengthError):
            number_or_text(text)


@pytest.mark.parametrize("mask", [None, pytest.param((8, 8, 40, 48), marks=pytest.mark.slow)])
def test_every_form_reaches_the_picture(pipe: InstantIDPipeline, mask: Any) -> None:
    forms = (1.0, "linear(1, 0)", "cosine(1, 0)", "1 until 0.7 then 0", [1, 0, 0, 0], "down=0, mid=1, up=1", "1, up0.1=0")
    forms = (*forms, "inside: 1; outside: 0.5", "inside: 0.5; outside: 1") if mask else forms
    pictures = [make(pipe, num_inference_steps=4, control_mask=mask, ip_adapter_scale=form) for form in forms]
    forms = (1.0, "linear(1, 0)", "1 until 0.7 then 0", "down=1, mid=0", "1, down0=0", "1, down0.0=0")
    pictures += [make(pipe, num_inference_steps=4, control_mask=mask, controlnet_conditioning_scale=[form]) for form in forms]
    same = [(i, j) for i, a in enumerate(pictures) for j, b in enumerate(pictures[:i]) if np.abs(a - b).max() <= 1e-4]
    assert not same


@pytest.mark.slow
def test_strengths_outside_of_a_mask(pipe: InstantIDPipeline) -> None:
    """Tolerances are 1e-5 of the largest latent: the sums are the same in another order."""
    box, both = (8, 8, 40, 48), ("ip_adapter_scale", "controlnet_conditioning_scale")
    grey = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    for mask in (box, grey):
        same = make(pipe, control_mask=mask, **dict.fromkeys(both, "inside: 0.7; outside: 0.7"))
        np.testing.assert_allclose(same, make(pipe, **dict.fromkeys(both, 0.7)), atol=1e-4)
        inside = make(pipe, control_mask=mask, **dict.fromkeys(both, "inside: 0.7; outside: 0"))
        np.testing.assert_allclose(inside, make(pipe, control_mask=mask, **dict.fromkeys(both, 0.7)), atol=1e-4)
    # The sides of a mask exchanged are the sides of the other mask.
    swapped = make(pipe, control_mask=1 - grey, **dict.fromkeys(both, "inside: 0.2; outside: linear(1, 0)"))
    np.testing.assert_allclose(swapped, make(pipe, control_mask=grey, **dict.fromkeys(both, "inside: linear(1, 0); outside: 0.2")), atol=1e-4)
    with pytest.raises(PipelineError, match="a strength outside needs a control_mask, which says where that is"):
        make(pipe, ip_adapter_scale="inside: 1; outside: 0")


@pytest.mark.slow
def test_schedules_of_people(pipe: InstantIDPipeline) -> None:
    whole = {"region": np.ones((64, 64), np.float32)}
    for name, own in (("ip_adapter_scale", "ip_adapter_scale"), ("controlnet_conditioning_scale", "identitynet_scale")):
        for text in ("linear(1, 0)", "0 until 0.4 then 1", "1, mid=linear(0, 1)"):
            expected = make(pipe, **{name: text})
            usual = {"ip_adapter_scale": 0.5} | {name: 1.0}
            np.testing.assert_allclose(of_people(pipe, person(0, **whole, **{own: text}), **usual), expected, atol=1e-4)
            np.testing.assert_allclose(of_people(pipe, person(0, **whole), **usual | {name: text}), expected, atol=1e-4)
    # The call's and the person's are multiplied.
    halves = of_people(pipe, person(0, ip_adapter_scale="linear(2, 0)"), person(1, ip_adapter_scale=2), ip_adapter_scale="0.5, mid=0.25")
    same = of_people(
        pipe, person(0, ip_adapter_scale="linear(1, 0), mid=linear(0.5, 0)"), person(1, ip_adapter_scale="1, mid=0.5"), ip_adapter_scale=1
    )
    np.testing.assert_allclose(halves, same, atol=1e-5)
    for outside in ({"ip_adapter_scale": "inside: 1; outside: 1"}, {"controlnet_conditioning_scale": "inside: 1; outside: 1"}):
        with pytest.raises(PipelineError, match="a strength outside has no meaning with people"):
            of_people(pipe, person(0), **outside)
    with pytest.raises(PipelineError, match=r"person 1 .*identitynet_scale says something of the outside"):
        of_people(pipe, person(0), person(1, identitynet_scale="inside: 1; outside: 1"))
    with pytest.raises(PipelineError, match=r"person 0 .*ip_adapter_scale the list has 2 values for 3 steps"):
        of_people(pipe, person(0, ip_adapter_scale=[1, 2]))


# --- guidance


def test_the_negative_identity(pipe: InstantIDPipeline) -> None:
    plain = make(pipe)
    np.testing.assert_array_equal(make(pipe, negative_identity_noise=0.0, negative_identity_seed=5), plain)
    first, again, other = (make(pipe, negative_identity_noise=1.0, negative_identity_seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4 and np.abs(first - plain).max() > 1e-4
    np.testing.assert_array_equal(make(pipe, guidance_scale=1.0, negative_identity_noise=1.0), make(pipe, guidance_scale=1.0))
    request = check_call(pipe.config, prompt="x", negative_identity_noise=0.35, negative_identity_seed=2)
    noise = request.negative_identities(np.zeros((1, 128), np.float32))
    assert noise.min() >= 0 and noise.max() < 0.35 and noise.dtype == np.float32 and abs(noise.mean() - 0.175) < 0.03
    tokens = pipe.prepare(request, draw_kps((64, 64), KPS), EMBEDDINGS[0]).conditions.identity_tokens
    np.testing.assert_allclose(tokens, pipe.encode_identity(np.concatenate([noise, EMBEDDINGS[:1]]), guided=False), atol=1e-5)


@pytest.mark.slow
def test_guidance_by_branch(pipe: InstantIDPipeline) -> None:
    plain, unguided = make(pipe, guidance_scale=3.0), make(pipe, guidance_scale=1.0)
    np.testing.assert_array_equal(make(pipe, guidance_scale=3.0, identity_guidance_scale=3.0), plain)
    np.testing.assert_array_equal(make(pipe, guidance_scale=1.0, identity_guidance_scale=1.0), unguided)
    apart = make(pipe, guidance_scale=3.0, identity_guidance_scale=1.5)
    near = make(pipe, guidance_scale=3.0, identity_guidance_scale=3.0 + 1e-6)  # the program of three branches
    np.testing.assert_allclose(near, plain, atol=1e-4)
    assert np.abs(apart - plain).max() > 1e-3
    # With nothing of the identity and no guidance by the text, what is drawn is the text without the person.
    with Compilations() as compiled:
        make(pipe, guidance_scale=1.0, identity_guidance_scale=0.0, guidance_rescale=0.5)
    assert compiled == []
    everything = {"identity_guidance_scale": 2.0, "num_images_per_prompt": 2, "cache_interval": 2, "control_interval": 2, "guidance_end": 0.7}
    assert np.isfinite(make(pipe, **everything)).all() and make(pipe, **everything).shape[0] == 2
    both = of_people(pipe, person(0), person(1), identity_guidance_scale=2.0, prompt_weighting=True, negative_prompt="x")
    assert np.isfinite(both).all()


@pytest.mark.slow
def test_outside_the_window_of_guidance_the_conditional_branch_is_computed(pipe: InstantIDPipeline) -> None:
    """With guidance in no call the picture is the unguided one, also of three branches."""
    given = {"guidance_scale": 3.0, "identity_guidance_scale": 2.0, "num_inference_steps": 2}
    request = check_call(pipe.config, prompt="a person", **given, guidance_end=0.5)
    inputs = pipe.prepare(request, draw_kps((64, 64), KPS), EMBEDDINGS[0])
    assert inputs.pace is not None and inputs.conditions.text.shape[0] == 3 and inputs.guidance_scale.tolist() == [3, 2]
    inputs = inputs._replace(pace=inputs.pace._replace(guidance=jnp.zeros(2, bool)))
    denoiser, weights = pipe.denoiser()
    found = programs.denoise(denoiser, request.solver, True, weights, *inputs, shortcuts=request.shortcuts)
    np.testing.assert_allclose(found, make(pipe, guidance_scale=1.0, num_inference_steps=2), atol=1e-5)


def test_a_third_branch_costs_half_of_two(pipe: InstantIDPipeline) -> None:
    def operations(steps: int, **given: Any) -> float:
        request = check_call(pipe.config, prompt="x", num_inference_steps=steps, **given)
        inputs = pipe.prepare(request, draw_kps((64, 64), KPS), EMBEDDINGS[0])
        denoiser, weights = pipe.denoiser()
        jaxpr = jax.make_jaxpr(lambda w, x: programs.denoise(denoiser, request.solver, request.guided, w, *x))(weights, inputs)
        return executed_flops(jaxpr, jax.tree.leaves((weights, inputs)))

    step = [operations(3, **given) - operations(2, **given) for given in ({}, {"identity_guidance_scale": 2.0})]
    assert step[1] == pytest.approx(1.5 * step[0], rel=1e-3)
