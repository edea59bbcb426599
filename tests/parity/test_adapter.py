"""The decoupled attention at every site of the UNet, alone and together with IdentityNet's residuals.

The reference is diffusers' UNet with attention processors that do what the paper says: the identity tokens are the last
of the context, they have their own keys and values and their own softmax, and the sum goes through the output projection.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CONFIGS, Inputs, inputs, torch_residuals, torch_unet_output
from diffusers import UNet2DConditionModel
from oracle import Flat, error, load, nhwc, random, torch_controlnet, torch_unet, weights

from instantid_jax.config import sdxl
from instantid_jax.models import build_networks
from instantid_jax.models.adapter import site_numbers
from instantid_jax.models.encoder import AddedConditions, IdentityContext
from instantid_jax.models.network import Network

BOUND = 1e-4
TOKENS = 16


class DecoupledProcessor(torch.nn.Module):
    """Attention for diffusers that reads the last tokens of the context as identity."""

    def __init__(self, key: np.ndarray, value: np.ndarray, scale: float, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.key, self.value = torch.from_numpy(key), torch.from_numpy(value)
        self.scale, self.mask = scale, mask

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        text, identity = encoder_hidden_states[:, :-TOKENS], encoder_hidden_states[:, -TOKENS:]

        def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            parts = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), keys, values))
            q, k, v = parts
            return (torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2).flatten(2)

        from_identity = attend(identity @ self.key, identity @ self.value)
        if self.mask is not None:
            ratio = (self.mask.numel() / hidden_states.shape[1]) ** 0.5
            small = torch.nn.functional.interpolate(self.mask[None, None], scale_factor=1 / ratio, mode="nearest")
            from_identity = from_identity * small.reshape(1, -1, 1)
        return attn.to_out[0](attend(attn.to_k(text), attn.to_v(text)) + self.scale * from_identity)


def install(unet: UNet2DConditionModel, sites: dict[int, str], adapter: Flat, scale: float, mask: np.ndarray | None) -> None:
    """Puts the adapter into diffusers' UNet by the published numbers: positions in its ordered `attn_processors`."""
    processors: dict[str, Any] = dict(unet.attn_processors)
    region = None if mask is None else torch.from_numpy(mask)
    for number, name in enumerate(processors):
        if number % 2:
            path = sites[number]
            processors[name] = DecoupledProcessor(adapter[f"{path}/to_k_ip/kernel"], adapter[f"{path}/to_v_ip/kernel"], scale, region)
    unet.set_attn_processor(processors)


@functools.cache
def networks(model: str) -> dict[str, Network]:
    return build_networks(CONFIGS[model])


@functools.cache
def flat(model: str, name: str) -> Flat:
    return weights(networks(model)[name], name)


def from_disk(model: str, name: str) -> Any:
    return networks(model)[name].from_disk({path: jnp.asarray(x) for path, x in flat(model, name).items()})


@functools.partial(jax.jit, static_argnums=0)
def predict(model: str, parameters: dict[str, Any], x: Inputs, scale: Any, mask: Any, strength: Any) -> Any:
    """The three networks together, as one denoising step runs them."""
    unet, identitynet, adapter = (networks(model)[name].bind(parameters[name]) for name in ("unet", "identitynet", "adapter"))
    added = AddedConditions(x.pooled, x.sizes)
    identity = IdentityContext(adapter(x.tokens), scale, mask)
    residuals = identitynet(x.sample, x.timestep, identitynet.project_context(x.tokens), added, identitynet.embed_condition(x.image))
    residuals = jax.tree.map(lambda r: r * strength, residuals)
    return unet(x.sample, x.timestep, unet.project_context(x.text), added, identity=identity, residuals=residuals)


@pytest.fixture(scope="module")
def tiny_parameters() -> dict[str, Any]:
    return {name: from_disk("tiny", name) for name in ("unet", "identitynet", "adapter")}


CASES = [("tiny", (16, 16), 0.8, False), ("tiny", (24, 16), 1.3, True), ("golden", (16, 24), 0.5, True), ("golden", (15, 15), 0.8, False)]
LARGE = pytest.param("tiny", (127, 127), 0.8, False, marks=pytest.mark.slow)


@pytest.mark.parametrize(("model", "size", "scale", "masked"), [*CASES, LARGE])
def test_whole_step(model: str, size: tuple[int, int], scale: float, masked: bool) -> None:
    """UNet, adapter and IdentityNet at once; batch of two, with and without a region for the identity."""
    x = inputs(CONFIGS[model], size)
    mask = np.clip(random("mask", 8 * size[0], 8 * size[1]), 0, 1) if masked else None
    parameters = {name: from_disk(model, name) for name in ("unet", "identitynet", "adapter")}
    batched = None if mask is None else jnp.asarray(np.stack([mask] * 2))
    ours = predict(model, parameters, x, jnp.float32(scale), batched, jnp.float32(0.7))

    unet = load(torch_unet(CONFIGS[model].unet), flat(model, "unet"))
    install(unet, site_numbers(CONFIGS[model].unet), flat(model, "adapter"), scale, mask)
    residuals = [0.7 * r for r in torch_residuals(load(torch_controlnet(CONFIGS[model].identitynet), flat(model, "identitynet")), x)]
    context = np.concatenate([x.text, x.tokens], axis=1)
    theirs = nhwc(torch_unet_output(unet, x, context, residuals[:-1], residuals[-1]))
    assert error(ours, theirs) <= BOUND


def test_scale_and_mask_of_zero_leave_the_text_alone(tiny_parameters: dict[str, Any]) -> None:
    x, zero, one = inputs(CONFIGS["tiny"], (16, 16)), jnp.float32(0), jnp.float32(1)
    everywhere, nowhere = jnp.ones((2, 128, 128)), jnp.zeros((2, 128, 128))
    unet = load(torch_unet(CONFIGS["tiny"].unet), flat("tiny", "unet"))
    plain = nhwc(torch_unet_output(unet, x, x.text))
    assert error(predict("tiny", tiny_parameters, x, zero, everywhere, zero), plain) <= BOUND
    assert error(predict("tiny", tiny_parameters, x, one, nowhere, zero), plain) <= BOUND
    assert error(predict("tiny", tiny_parameters, x, one, everywhere, zero), plain) > 0.01
    assert error(predict("tiny", tiny_parameters, x, zero, nowhere, one), plain) > 0.01


def test_mask_is_each_examples_own(tiny_parameters: dict[str, Any]) -> None:
    x, one = inputs(CONFIGS["tiny"], (16, 16)), jnp.float32(1)
    on, off, first = (jnp.ones((2, 128, 128)) * jnp.float32(v)[:, None, None] for v in ([1, 1], [0, 0], [1, 0]))
    everywhere, nowhere, mixed = (predict("tiny", tiny_parameters, x, one, mask, one) for mask in (on, off, first))
    assert np.array_equal(mixed[0], everywhere[0])
    assert np.array_equal(mixed[1], nowhere[1])


def test_site_numbers_are_positions_in_diffusers() -> None:
    """All 70 sites of the SDXL layout, against the full-size UNet (on no device: names and shapes only)."""
    config = sdxl().unet
    sites = site_numbers(config)
    with torch.device("meta"):
        reference = torch_unet(config)
    names = [name.removesuffix(".processor").replace(".", "/") for name in reference.attn_processors]
    assert len(names) == 140
    assert list(sites) == list(range(1, 140, 2))
    assert list(sites.values()) == names[1::2]
    shapes = build_networks(sdxl())["adapter"].disk_shapes()
    assert len(shapes) == 140
    for number, path in sites.items():
        width = 640 if number <= 7 or 109 <= number <= 119 else 1280
        assert shapes[f"{path}/to_k_ip/kernel"] == shapes[f"{path}/to_v_ip/kernel"] == (2048, width)


# First number, number of blocks: the published table of the 70 sites.
MODULES = {
    "down_blocks/1/attentions/0": (1, 2),
    "down_blocks/1/attentions/1": (5, 2),
    "down_blocks/2/attentions/0": (9, 10),
    "down_blocks/2/attentions/1": (29, 10),
    "up_blocks/0/attentions/0": (49, 10),
    "up_blocks/0/attentions/1": (69, 10),
    "up_blocks/0/attentions/2": (89, 10),
    "up_blocks/1/attentions/0": (109, 2),
    "up_blocks/1/attentions/1": (113, 2),
    "up_blocks/1/attentions/2": (117, 2),
    "mid_block/attentions/0": (121, 10),
}


def test_sdxl_has_seventy_sites_where_published() -> None:
    sites = site_numbers(sdxl().unet)
    expected = {n0 + 2 * k: f"{module}/transformer_blocks/{k}/attn2" for module, (n0, depth) in MODULES.items() for k in range(depth)}
    assert sites == expected
    assert len(sites) == 70


def test_unet_and_adapter_agree_on_the_sites() -> None:
    """The UNet asks for keys and values at exactly the paths that the adapter gives, as many blocks deep."""

    def shapes(name: str, function: Any) -> Any:
        network = build_networks(sdxl())[name]
        return jax.eval_shape(lambda parameters: function(network.bind(parameters)), network.abstract)

    text = shapes("unet", lambda m: m.project_context(jnp.zeros((1, 77, 2048))).keys_values)
    identity = shapes("adapter", lambda m: m(jnp.zeros((1, 16, 2048))))
    assert set(text) == set(identity) == set(MODULES)
    unet = build_networks(sdxl())["unet"]
    assert list(unet.bind(unet.abstract).sites()) == list(MODULES)
    for module, (_, depth) in MODULES.items():
        assert text[module].k.shape == (depth, 1, 77, *text[module].k.shape[3:])
        assert identity[module].k.shape == identity[module].v.shape == (depth, 1, 16, *text[module].k.shape[3:])


def test_no_site_is_dead(tiny_parameters: dict[str, Any]) -> None:
    """Another `to_v_ip` at any one site alone, and another `to_k_ip`, change the prediction."""
    x, one = inputs(CONFIGS["tiny"], (8, 8), batch=1), jnp.float32(1)
    before = predict("tiny", tiny_parameters, x, one, None, one)
    sites = site_numbers(CONFIGS["tiny"].unet)
    assert len(sites) == 28
    for path in sites.values():
        for name in ("to_k_ip", "to_v_ip"):
            changed = dict(flat("tiny", "adapter"))
            changed[f"{path}/{name}/kernel"] = changed[f"{path}/{name}/kernel"] * np.float32(-1)
            adapter = networks("tiny")["adapter"].from_disk({p: jnp.asarray(v) for p, v in changed.items()})
            assert error(predict("tiny", {**tiny_parameters, "adapter": adapter}, x, one, None, one), before) > 1e-4, f"{path}/{name}"
