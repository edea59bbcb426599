"""Whole networks against diffusers and transformers on equal random weights, in float32: largest relative error 1e-4."""

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CONFIGS, DEV, Inputs, inputs, torch_residuals, torch_unet_output
from oracle import Flat, error, load, nchw, nhwc, random, rms_error, run, to_torch, torch_controlnet, torch_text, torch_unet, torch_vae, weights

from instantid_jax.config import ComputeConfig, ResamplerConfig
from instantid_jax.models import build_networks
from instantid_jax.models.encoder import AddedConditions
from instantid_jax.models.network import Network

BOUND = 1e-4
SIZES = [(16, 16), (24, 16), (15, 15), pytest.param((127, 127), marks=pytest.mark.slow)]
MODELS = list(CONFIGS)


@functools.cache
def networks(model: str, compute: ComputeConfig | None = None) -> dict[str, Network]:
    return build_networks(CONFIGS[model], compute)


@functools.cache
def _flat(model: str, name: str) -> Flat:
    return weights(networks(model)[name], name)


def flat(model: str, name: str) -> Flat:
    """The weights of one network, kept, but for the resampler's of the golden case: it has the published size."""
    return _flat(model, name) if name != "resampler" else weights(networks(model)[name], name)


@functools.cache
def oracle(model: str, name: str) -> Any:
    """The PyTorch network with the same weights."""
    config, parameters = getattr(CONFIGS[model], name), flat(model, name)
    if name.startswith("text"):
        return torch_text(config, parameters)
    return load({"unet": torch_unet, "identitynet": torch_controlnet, "vae": torch_vae}[name](config), parameters)


def unet(m: Any, x: Inputs) -> Any:
    return m(x.sample, x.timestep, m.project_context(x.text), AddedConditions(x.pooled, x.sizes))


def identitynet(m: Any, x: Inputs) -> Any:
    return m(x.sample, x.timestep, m.project_context(x.tokens), AddedConditions(x.pooled, x.sizes), m.embed_condition(x.image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_unet(model: str, size: tuple[int, int]) -> None:
    x = inputs(CONFIGS[model], size, batch=1 if size[0] > 100 else 3)
    ours = run(networks(model)["unet"], flat(model, "unet"), unet, x)
    assert error(ours, nhwc(torch_unet_output(oracle(model, "unet"), x, x.text))) <= BOUND


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_identitynet(model: str, size: tuple[int, int]) -> None:
    x = inputs(CONFIGS[model], size, batch=1 if size[0] > 100 else 3)
    theirs = torch_residuals(oracle(model, "identitynet"), x)
    ours = run(networks(model)["identitynet"], flat(model, "identitynet"), identitynet, x)
    for mine, reference in zip([*ours.down, ours.mid], theirs, strict=True):
        assert error(mine, nhwc(reference)) <= BOUND


def test_scalar_timestep_is_every_examples() -> None:
    x = inputs(CONFIGS["tiny"], (8, 8))

    def time(m: Any, y: Inputs) -> Any:
        return m.embed_time(y.timestep, AddedConditions(y.pooled, y.sizes), 2)

    times = np.float32(501), np.float32([501, 501])
    scalar, vector = (run(networks("tiny")["unet"], flat("tiny", "unet"), time, x._replace(timestep=t)) for t in times)
    assert np.array_equal(scalar, vector)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (120, 120), pytest.param((504, 1016), marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_vae(model: str, size: tuple[int, int]) -> None:
    network, parameters, reference = networks(model)["vae"], flat(model, "vae"), oracle(model, "vae")
    batch = 1 if size[0] > 400 else 2
    image = np.clip(random("picture", batch, *size, 3), -1, 1)
    ours = run(network, parameters, lambda m, y: m.encode(y), image)
    theirs = reference.encode(nchw(image)).latent_dist
    assert error(ours.mean, nhwc(theirs.mean)) <= BOUND
    assert error(ours.logvar, nhwc(theirs.logvar)) <= BOUND
    z = random("latent", batch, size[0] // 8, size[1] // 8, 4)
    assert error(ours.sample(jnp.asarray(z)), nhwc(theirs.mean + theirs.std * nchw(z))) <= BOUND
    assert error(run(network, parameters, lambda m, y: m.decode(y), z), nhwc(reference.decode(nchw(z)).sample)) <= BOUND


def test_vae_scaling_is_its_own_inverse() -> None:
    network, parameters = networks("tiny")["vae"], flat("tiny", "vae")
    z = random("latent", 1, 4, 4, 4)
    scaled = run(network, parameters, lambda m, y: m.scale(y), z)
    np.testing.assert_allclose(scaled, z * 0.13025, rtol=1e-6)
    np.testing.assert_allclose(run(network, parameters, lambda m, y: m.unscale(y), scaled), z, rtol=1e-6)


def prompts(count: int = 77) -> np.ndarray:
    """Token ids as the two tokenizers give them: padded with the end-of-text token, and padded with 0 after it; a full row."""
    ids = np.random.default_rng(0).integers(1, 49406, (3, count))
    ids[:, 0] = 49406
    ids[0, 9:] = 49407
    ids[1, 40], ids[1, 41:] = 49407, 0
    ids[2, -1] = 49407
    return ids.astype(np.int32)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("model", MODELS)
def test_text_towers(model: str, name: str) -> None:
    ids = prompts()
    theirs = oracle(model, name)(torch.from_numpy(ids).long(), output_hidden_states=True)
    ours = run(networks(model)[name], flat(model, name), lambda m, i: m(i), ids)
    assert ours.hidden.shape[0] == len(theirs.hidden_states) == getattr(CONFIGS[model], name).num_hidden_layers + 1
    for mine, reference in zip(ours.hidden, theirs.hidden_states, strict=True):
        assert error(mine, reference) <= BOUND
    pooled = theirs.text_embeds if name == "text_encoder_2" else theirs.pooler_output
    assert error(ours.pooled, pooled) <= BOUND


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_pooled_state_is_taken_at_the_first_end_of_text(name: str) -> None:
    """Attention is causal, so what follows the first end-of-text token cannot change the pooled state; what precedes it does."""
    network, parameters = networks("tiny")[name], flat("tiny", name)
    ids = prompts()[1:2]
    after, before = ids.copy(), ids.copy()
    after[:, 50:], before[:, 39] = 49407, 7
    pooled = [run(network, parameters, lambda m, i: m(i).pooled, x) for x in (ids, after, before)]
    assert np.array_equal(pooled[0], pooled[1])
    assert error(pooled[2], pooled[0]) > 1e-3


def torch_resampler(config: ResamplerConfig, parameters: Flat, embedding: torch.Tensor) -> torch.Tensor:
    """The Perceiver resampler written out: latents read the face vector and themselves, layer after layer."""
    p = {name: torch.from_numpy(x) for name, x in parameters.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", torch.tensor(0.0))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-5)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (config.heads, config.dim_head)).transpose(1, 2)

    face = linear("proj_in", embedding[:, None])
    latents = p["latents"].expand(len(embedding), -1, -1)
    for i in range(config.depth):
        attention, feed_forward = f"layers/{i}/attn", f"layers/{i}/ff"
        own = norm(f"{attention}/norm2", latents)
        keys_values = linear(f"{attention}/to_kv", torch.cat([norm(f"{attention}/norm1", face), own], dim=1))
        q, k, v = heads(linear(f"{attention}/to_q", own)), *(heads(part) for part in keys_values.chunk(2, dim=-1))
        weights_ = torch.softmax((q @ k.mT) * config.dim_head**-0.5, dim=-1)
        latents = latents + linear(f"{attention}/to_out", (weights_ @ v).transpose(1, 2).flatten(2))
        inner = torch.nn.functional.gelu(linear(f"{feed_forward}/proj_in", norm(f"{feed_forward}/norm", latents)))
        latents = latents + linear(f"{feed_forward}/proj_out", inner)
    return norm("norm_out", linear("proj_out", latents))


@pytest.mark.parametrize("model", MODELS)
def test_resampler(model: str) -> None:
    config = CONFIGS[model].resampler
    embedding = random("face", 3, config.embedding_dim)
    embedding[1] = 0  # the unconditional identity
    theirs = torch_resampler(config, flat(model, "resampler"), torch.from_numpy(embedding))
    ours = run(networks(model)["resampler"], flat(model, "resampler"), lambda m, e: m(e), embedding)
    assert ours.shape == (3, config.num_queries, config.output_dim)
    assert error(ours, theirs) <= BOUND
    assert np.abs(np.asarray(ours[1])).max() > 0.1


# bfloat16 has 8 bits of mantissa: an error of 2^-9 at every rounding, about one in a hundred over a network's depth.
BFLOAT16 = 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16(model: str) -> None:
    """The same weights computed in bfloat16, against PyTorch in float32: root mean square error 3e-2 of the signal's."""
    x, half = inputs(CONFIGS[model], (16, 16)), networks(model, ComputeConfig(dtype="bfloat16"))
    predicted = run(half["unet"], flat(model, "unet"), unet, x)
    assert predicted.dtype == "bfloat16"
    assert rms_error(predicted, nhwc(torch_unet_output(oracle(model, "unet"), x, x.text))) <= BFLOAT16
    residuals = run(half["identitynet"], flat(model, "identitynet"), identitynet, x)
    for mine, reference in zip([*residuals.down, residuals.mid], torch_residuals(oracle(model, "identitynet"), x), strict=True):
        assert rms_error(mine, nhwc(reference)) <= BFLOAT16
    z = random("latent", 2, 8, 8, 4)
    assert rms_error(run(half["vae"], flat(model, "vae"), lambda m, y: m.decode(y), z), nhwc(oracle(model, "vae").decode(nchw(z)).sample)) <= BFLOAT16
    for name in ("text_encoder", "text_encoder_2"):
        theirs = oracle(model, name)(torch.from_numpy(prompts()).long(), output_hidden_states=True).hidden_states[-2]
        assert rms_error(run(half[name], flat(model, name), lambda m, i: m(i).hidden[-2], prompts()), theirs) <= BFLOAT16
    embedding = random("face", 2, CONFIGS[model].resampler.embedding_dim)
    theirs = torch_resampler(CONFIGS[model].resampler, flat(model, "resampler"), torch.from_numpy(embedding))
    assert rms_error(run(half["resampler"], flat(model, "resampler"), lambda m, e: m(e), embedding), theirs) <= BFLOAT16


def test_unrolled_unet_gives_the_same_numbers() -> None:
    x = inputs(CONFIGS["golden"], (16, 16), batch=3)
    scanned = run(networks("golden")["unet"], flat("golden", "unet"), unet, x)
    assert error(run(networks("golden", ComputeConfig(unroll=True))["unet"], flat("golden", "unet"), unet, x), scanned) <= 1e-5


@pytest.mark.parametrize("name", ["resampler", "text_encoder", "text_encoder_2"])
def test_unrolled_towers_give_the_same_numbers(name: str) -> None:
    argument = random("face", 2, 128) if name == "resampler" else prompts()
    both = networks("tiny"), networks("tiny", ComputeConfig(unroll=True))
    outputs = [run(nets[name], flat("tiny", name), lambda m, a: m(a), argument) for nets in both]
    pairs = [outputs] if name == "resampler" else zip(*outputs, strict=True)
    assert all(error(b, a) <= 1e-5 for a, b in pairs)


@pytest.mark.parametrize("name", ["unet", "identitynet", "vae", "text_encoder", "text_encoder_2"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    """The golden case lists what diffusers' own classes saved."""
    part = "controlnet" if name == "identitynet" else name
    published = {key: tuple(shape) for key, shape in json.loads((DEV / "shapes.json").read_text())[part].items()}
    ours = to_torch(flat("golden", name), "text_model." if name.startswith("text") else "")
    assert {key: tuple(x.shape) for key, x in ours.items()} == published
