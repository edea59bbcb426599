"""Several people in one picture: what the networks are given, where each identity reaches, and what is refused."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from instantid_jax import Person
from instantid_jax import denoise as programs
from instantid_jax.config import ComputeConfig, tiny
from instantid_jax.defaults import random_pipeline
from instantid_jax.denoise import control_masks
from instantid_jax.face import draw_kps
from instantid_jax.models.encoder import TextContext
from instantid_jax.nn.attention import Attention, IdentitySite, KeysValues
from instantid_jax.parallel.flops import executed_flops
from instantid_jax.people import check_people
from instantid_jax.pipeline import InstantIDPipeline, PipelineError, check_call
from instantid_jax.prediction import Call, Fixed, Predictor, Shortcuts

KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])
EMBEDDINGS = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
BOXES = ((0, 0, 32, 64), (32, 0, 64, 64), (0, 40, 20, 64))


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


def person(i: int, **changes: Any) -> Person:
    given = {"image_embeds": EMBEDDINGS[i], "image": draw_kps((64, 64), KPS + 4 * i), "region": BOXES[i]}
    return Person(**given | changes)


def make(pipe: InstantIDPipeline, *people: Person, **changes: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "latent", "max_people": 3, "control_guidance_end": 0.9} | changes
    return pipe("a person", people=list(people), **options).images


@pytest.mark.slow
def test_one_person_is_a_call_with_a_mask(pipe: InstantIDPipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "latent", "control_guidance_end": 0.9}
    alone = pipe("a person", draw_kps((64, 64), KPS), EMBEDDINGS[0], control_mask=BOXES[0], **options).images
    np.testing.assert_allclose(make(pipe, person(0)), alone, atol=1e-4)
    assert np.abs(make(pipe, person(0), person(1)) - alone).max() > 1e-3
    np.testing.assert_allclose(make(pipe, person(0), person(1, identitynet_scale=0, ip_adapter_scale=0.0)), alone, atol=1e-4)


def test_up_to_the_bound_nothing_is_compiled(pipe: InstantIDPipeline, compilations: Any) -> None:
    first = make(pipe, person(0))
    with compilations() as compiled:
        others = [make(pipe, *map(person, range(n))) for n in (2, 3)]
        others += [make(pipe, person(0), person(1, ip_adapter_scale=0.3)), make(pipe, person(1, region=np.ones((64, 64), np.float32)))]
    assert compiled == []
    pictures = [first, *others]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.slow
def test_shortcuts_go_with_people(pipe: InstantIDPipeline) -> None:
    both = person(0), person(1)
    fast = make(pipe, *both, cache_interval=2, control_interval=2)
    assert np.isfinite(fast).all() and np.abs(fast - make(pipe, *both)).max() > 1e-4


def test_free_places_cost_nothing_and_each_person_one_run_of_identitynet(pipe: InstantIDPipeline) -> None:
    def operations(count: int, places: int) -> float:
        request = check_call(pipe.config, prompt="x", num_inference_steps=1)
        inputs = pipe.prepare(request, None, None, people=[person(i) for i in range(count)], max_people=places)
        denoiser, weights = pipe.denoiser()

        def call(weights: Any, inputs: Any) -> Any:
            return programs.denoise(denoiser, request.solver, True, weights, *inputs)

        return executed_flops(jax.make_jaxpr(call)(weights, inputs), jax.tree.leaves((weights, inputs)))

    one, two, three = (operations(n, 3) for n in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=1e-9) and two - one > 0.05 * one


# --- hard regions: nothing of B reaches A before the layers mix


def test_the_attention_of_one_region_has_no_gradient_of_the_other_person() -> None:
    attention = Attention(16, 8, 2, compute=ComputeConfig(), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1).standard_normal
    x, text = jnp.asarray(draw((2, 6, 16), np.float32)), jnp.asarray(draw((2, 5, 8), np.float32))
    keys = KeysValues(*(jnp.asarray(draw((2, 2, 4, 2, 8), np.float32)) for _ in range(2)))
    mask = jnp.asarray([[1, 0]] * 2 + [[0, 1]] * 4, jnp.float32)[None]

    def region(keys: KeysValues, rows: slice) -> jax.Array:
        site = IdentitySite(keys, jnp.asarray([0.8, 0.8]), mask)
        return jnp.sum(jnp.sin(attention(x, attention.project(text), None, site)[:, rows]))

    for own, rows in ((0, slice(0, 2)), (1, slice(2, 6))):
        for gradient in jax.grad(region)(keys, rows):
            assert np.abs(gradient[:, own]).min() > 0
            np.testing.assert_array_equal(gradient[:, 1 - own], 0)


def test_the_residuals_of_one_region_have_no_gradient_of_the_other_person(pipe: InstantIDPipeline) -> None:
    net, unet = (pipe.networks[name].bind(pipe.parameters[name]) for name in ("identitynet", "unet"))
    draw = np.random.default_rng(2).standard_normal
    width = pipe.config.resampler.output_dim
    x, tokens = jnp.asarray(draw((1, 8, 8, 4), np.float32)), jnp.asarray(draw((1, 2, 16, width), np.float32))
    images = jnp.asarray(np.stack([np.asarray(draw_kps((64, 64), KPS), np.float32) / 255] * 2))[None]
    time = jnp.asarray(draw((1, pipe.config.unet.time_embed_dim), np.float32))
    regions = np.zeros((1, 64, 64, 2), np.float32)
    regions[:, :, :32, 0] = regions[:, :, 32:, 1] = 1
    masks = control_masks(jnp.asarray(regions), (8, 8), 3)
    features = jax.vmap(net.embed_condition, 1, 1)(images)
    ones = jnp.ones((1, 2, 1)), jnp.ones((1, 1))
    call = Call((time, time), ones[0], ones[1], jnp.full((1, 2), 2), jnp.bool_(True), jnp.bool_(True))

    def residuals(tokens: jax.Array) -> list[jax.Array]:
        contexts = (jax.vmap(net.project_context, 1, 2)(tokens),)
        fixed = Fixed(TextContext({}), {}, contexts, (features,), jnp.asarray(regions), masks)
        predictor = Predictor(unet, (net,), fixed, Shortcuts())
        return predictor._total([predictor._control(0, None, x, call)], call)

    @jax.jit
    def gradients(tokens: jax.Array) -> list[jax.Array]:
        def left(tokens: jax.Array, i: int) -> jax.Array:
            r = residuals(tokens)[i]
            return jnp.sum(jnp.sin(jnp.where(masks[r.shape[1], r.shape[2]][..., 1:] == 0, r, 0)))

        return [jax.grad(left)(tokens, i) for i in (4, 8)]  # the first residuals after an attention, at two resolutions

    for gradient in gradients(tokens):
        assert np.abs(gradient[:, 0]).max() > 1e-6
        np.testing.assert_array_equal(gradient[:, 1], 0)


# --- what is refused


def test_regions_that_overlap_are_shared() -> None:
    request = check_call(tiny(), prompt="x")
    people = check_people([person(0), person(0), person(1)], 4, request, (64, 64), 128)
    np.testing.assert_array_equal(people.masks[10, 10], [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(people.masks[10, 40], [0, 0, 1, 0])
    assert people.embeddings.shape == (4, 128) and not people.control_scales[:, 3].any() and not people.adapter_scales[:, 3].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"people": []}, "people must be a list of instantid_jax.Person, at least one"),
        ({"people": [EMBEDDINGS[0]]}, "people must be a list of instantid_jax.Person"),
        ({"people": [person(0)], "image_embeds": EMBEDDINGS[0]}, "leave out image_embeds and control_mask"),
        ({"people": [person(0)], "control_mask": BOXES[0]}, "leave out image_embeds and control_mask"),
        ({"people": [person(0)] * 5}, "people has 5 people, max_people is 4; raise it, which compiles anew"),
        ({"people": [person(0)], "max_people": 0}, "max_people must be between 1 and 64, not 0"),
        ({"people": [person(0), person(1, region=(70, 0, 80, 9))]}, re.escape("person 1 (counted from 0): control_mask: the box")),
        ({"people": [person(0, region=np.zeros((64, 64)))]}, "region is empty; give a mask or a box"),
        ({"people": [person(0, region=None)]}, "region is empty"),
        ({"people": [person(0), person(1, image_embeds=np.zeros(128))]}, r"person 1 .*zero vector"),
        ({"people": [person(0), person(1, image="x")]}, r"person 1 .*image must be"),
        ({"people": [person(0, ip_adapter_scale=11)]}, r"person 0 .*ip_adapter_scale must be between -10 and 10, not 11"),
        ({}, "image must be"),
    ],
)
def test_bad_people_get_one_clear_sentence(pipe: InstantIDPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        pipe("a person", num_inference_steps=2, **arguments)
