"""Sampling as five functions of weights and arrays, each one compiled program; one of them in parts too.

    encode_text      token ids               -> text states, pooled state
    encode_identity  face embeddings         -> identity tokens
    encode           a picture               -> latents          (image to image alone)
    denoise          noise and conditions    -> latents          (one loop over the steps; `denoise_watched`: a program a step)
    decode           latents                 -> pictures in [0, 1]

They are pure, but that `denoise_watched` tells of every finished call. Static, so that another value
compiles anew, are the networks, all shapes (sizes, batch, length of the text), the sampler with its options, the number of
steps, and whether there is guidance and of how many branches, a mask of the text, a control mask, a picture to begin with, a mask of what is
redrawn in it, shortcuts, and strengths by layer or place. Everything else that a user changes between pictures is
traced: prompts, seeds, strengths and their schedules, windows, masks, pictures. A second call with other values compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from instantid_jax.diffusion import Plan, Sampler
from instantid_jax.lora import apply_loras, changed_kernels, with_kernels
from instantid_jax.models import Network
from instantid_jax.models.encoder import AddedConditions
from instantid_jax.models.tiling import Tiling, decode_tiled, encode_tiled
from instantid_jax.nn.placement import map_rows
from instantid_jax.prediction import Fixed, MaskOfSize, Pace, Predictor, Shortcuts, guide, plan_calls

__all__ = [
    "Conditions",
    "Denoiser",
    "Edit",
    "Inputs",
    "control_masks",
    "decode",
    "denoise",
    "denoise_watched",
    "encode",
    "encode_identity",
    "encode_text",
    "encoding_noise",
    "initial_noise",
]

Parameters = dict[str, Any]
Loras = tuple[Any, ...]
"""What `lora.apply_loras` takes."""
_ENCODING = 2**31 - 1  # which draw of a picture's key the autoencoder takes; the steps take those from 1


class Denoiser(NamedTuple):
    """The networks that run in every step; static."""

    unet: Network
    adapter: Network
    identitynet: Network
    controlnets: tuple[Network, ...] = ()


class Conditions(NamedTuple):
    """Everything that a picture is conditioned on. With guidance B holds branches one after the other: the unconditional, then the
    conditional one; with a guidance of its own for the identity, between them the one of the text alone, whose identity is the
    unconditional one's."""

    text: Array
    """Text states [B, m, c]."""
    text_mask: Array | None
    """Which text tokens count, [B, m] bool; None is all."""
    added: AddedConditions
    """Pooled text [B, p] and sizes [B, 6]."""
    identity_tokens: Array
    """Resampler output [B, n, c], of several people [B, people, n, c]; of the unconditional branch those of zeros (or noise)."""
    images: tuple[Array, ...]
    """Control pictures in [0, 1], [1 or B, H, W, 3]: the keypoints for IdentityNet (of several people [1 or B, people, H, W, 3]), then one
    for every other ControlNet."""
    control_scales: Array
    """[calls, nets] or [calls, nets, 1 or people or places, 1 or residuals]: strength of each net, already zero outside its window.
    A person whose strengths are zero is not computed."""
    adapter_scale: Array
    """[calls] or [calls, 1 or people or places, 1 or layers]: strength of the image adapter."""
    control_mask: Array | None
    """[1 or B, H, W] in [0, 1]: where IdentityNet and the image adapter act; None is everywhere. Several people have one each:
    [1 or B, H, W, people], as have two or more places of one person with strengths of their own."""


class Edit(NamedTuple):
    """A picture that is changed instead of made from noise alone (`editing`)."""

    count: Array
    """How many of the plan's calls are made, its first ones; a whole number. The rest are not computed."""
    image: Array
    """Latents [b, h, w, c] of the picture."""
    noise: Array
    """Unit normal [b, h, w, c]: the noise that `latents` has."""
    mask: Array | None
    """[1 or b, h, w, 1]: 1 where it is redrawn; elsewhere the picture's own latents take its place after each call. None is everywhere."""


class Inputs(NamedTuple):
    """The arrays that `denoise` takes beside the weights, in its order."""

    conditions: Conditions
    latents: Array
    """Noise [b, h, w, c] at the plan's first noise level."""
    seeds: Array
    """[b] uint32."""
    plan: Plan
    guidance_scale: Array
    """Scalar; of three branches [2], of text and identity."""
    guidance_rescale: Array
    pace: Pace | None = None
    edit: Edit | None = None


@functools.partial(jax.jit, static_argnames=("network",))
def encode_text(network: Network, parameters: Parameters, ids: Array, loras: Loras = ()) -> Any:
    """Hidden states of every layer [l, b, n, c] and the pooled state [b, p] of token ids [b, n]."""
    return network.bind(apply_loras(parameters, loras))(ids)


@functools.partial(jax.jit, static_argnames=("network",))
def encode_identity(network: Network, parameters: Parameters, embeddings: Array) -> Array:
    """Identity tokens [b, n, c] of face embeddings [b, d]."""
    return network.bind(parameters)(embeddings)


@functools.partial(jax.jit, static_argnames=("network", "tiling"))
def decode(network: Network, parameters: Parameters, latents: Array, tiling: Tiling | None = None) -> Array:
    """Pictures [b, H, W, 3] in [0, 1] of scaled latents [b, h, w, c], on each device one after the other to bound the memory; with `tiling` in
    tiles."""
    vae = network.bind(parameters)

    def one(latent: Array) -> Array:
        z = vae.unscale(latent[None].astype(network.compute.dtype))
        image = (vae.decode(z) if tiling is None else decode_tiled(vae, z, tiling))[0]
        return jnp.clip(image.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)

    return map_rows(one, latents)


@functools.partial(jax.jit, static_argnames=("network", "tiling"))
def encode(network: Network, parameters: Parameters, image: Array, noise: Array | None, tiling: Tiling | None = None) -> Array:
    """Scaled latents [b, h, w, c] of a picture [1, H, W, 3] in [0, 1]: the autoencoder's distribution at unit normal `noise` [b, h, w, c].

    Without noise they are its mean, [1, h, w, c].
    """
    vae = network.bind(parameters)
    x = (image * 2 - 1).astype(network.compute.dtype)
    found = vae.encode(x) if tiling is None else encode_tiled(vae, x, tiling)
    mean, logvar = found.mean.astype(jnp.float32), found.logvar.astype(jnp.float32)
    return vae.scale(mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise)


def picture_keys(seeds: Array) -> Array:
    """One random key a picture, from its seed alone: a picture does not depend on the batch it is made in."""
    return jax.vmap(jax.random.key)(seeds)


@functools.partial(jax.jit, static_argnames=("shape",))
def initial_noise(seeds: Array, shape: tuple[int, ...]) -> Array:
    """Unit normal noise [b, *shape]; picture i depends on seeds[i] only."""
    return _normal(picture_keys(seeds), 0, shape)


@functools.partial(jax.jit, static_argnames=("shape",))
def encoding_noise(seeds: Array, shape: tuple[int, ...]) -> Array:
    """The same for `encode`; independent of `initial_noise` and of the steps' noise."""
    return _normal(picture_keys(seeds), _ENCODING, shape)


def _normal(keys: Array, index: Array | int, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def control_masks(mask: Array, size: tuple[int, int], levels: int) -> MaskOfSize:
    """The picture-sized mask [b, H, W] or [b, H, W, p] at the resolution `size` of the latent and of `levels` - 1 halvings, each rounded up.

    Bilinear, half-pixel centres, no antialiasing.
    """
    out: MaskOfSize = {}
    mask = mask if mask.ndim == 4 else mask[..., None]
    for _ in range(levels):
        rows, columns = (_bilinear_taps(n, m) for n, m in zip(mask.shape[1:3], size, strict=True))
        out[size] = jnp.einsum("hH,bHWp,wW->bhwp", rows, mask, columns)
        size = -(-size[0] // 2), -(-size[1] // 2)
    return out


def _bilinear_taps(old: int, new: int) -> Array:
    """[new, old] matrix of torch's `interpolate(mode="bilinear", align_corners=False)` along one axis."""
    position = jnp.maximum((jnp.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = jnp.floor(position).astype(jnp.int32)
    high = jnp.minimum(low + 1, old - 1)
    weight = (position - low)[:, None]
    return jax.nn.one_hot(low, old) * (1 - weight) + jax.nn.one_hot(high, old) * weight


_STATIC = ("denoiser", "sampler", "guided", "shortcuts")


class Run(NamedTuple):
    """What is computed before the first call of a run, and does not change from call to call."""

    kernels: dict[str, Array]
    """Those of the UNet that LoRAs change, by path, with them added."""
    fixed: Fixed
    items: Any
    """Of all calls: rows of the plan, of an `Edit` the following ones too, `prediction.Call`, numbers."""
    keys: Array
    guidance_scale: Array
    guidance_rescale: Array
    edit: Edit | None


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("latents",))
def denoise(
    denoiser: Denoiser,
    sampler: Sampler,
    guided: bool,
    parameters: Parameters,
    conditions: Conditions,
    latents: Array,
    seeds: Array,
    plan: Plan,
    guidance_scale: Array,
    guidance_rescale: Array,
    pace: Pace | None = None,
    edit: Edit | None = None,
    shortcuts: Shortcuts = Shortcuts(),  # noqa: B008 (immutable)
) -> Array:
    """Latents of pictures from noise [b, h, w, c] that is already at the plan's first noise level, and that is used up.

    `parameters` holds the weights under "unet", "adapter", "identitynet" and "controlnets" (a tuple), and under "loras" what
    `lora.apply_loras` adds to the UNet's. With `guided` the conditions are two or three times as long as the latents (`Conditions`). With
    `shortcuts` it leaves work out as `pace` says (`prediction`). With `edit` a picture is changed: `latents` are that picture with noise
    (or, with a mask, noise alone), and only the plan's first calls are made.
    """
    inputs = Inputs(conditions, latents, seeds, plan, guidance_scale, guidance_rescale, pace, edit)
    run, carry = _begin(denoiser, sampler, guided, parameters, inputs, shortcuts)
    branches = _branches(guided, conditions, latents)
    advance = functools.partial(_advance, denoiser, sampler, branches, parameters, shortcuts, run)
    if edit is None:
        return jax.lax.scan(lambda carry, item: (advance(carry, item), None), carry, run.items)[0][0].sample
    return jax.lax.fori_loop(0, edit.count, lambda index, carry: advance(carry, _item(run, index)), carry)[0].sample


def denoise_watched(
    denoiser: Denoiser, sampler: Sampler, guided: bool, parameters: Parameters, inputs: Inputs, shortcuts: Shortcuts, on_call: Callable[[int], None]
) -> Array:
    """The latents of `denoise`, from one program for what comes before the calls and one for a call.

    `on_call` gets the number of each finished call. The device has the next one before a call ends; what `on_call` raises is raised here
    at once, and the device ends with the call that it has. (One program that calls back would not be kept by JAX's compilation cache.)
    Of several processes all must watch, or none.
    """
    count = inputs.plan.num_calls if inputs.edit is None else int(inputs.edit.count)
    branches = _branches(guided, inputs.conditions, inputs.latents)
    run, carry = _begin_alone(denoiser, sampler, guided, parameters, inputs, shortcuts)
    finished: Array | None = None
    for index in range(count):
        carry, following = _advance_alone(denoiser, sampler, branches, shortcuts, parameters, run, carry, np.int32(index))
        if finished is not None:
            finished.block_until_ready()
            on_call(index - 1)
        finished = following
    if finished is not None:
        finished.block_until_ready()
        on_call(count - 1)
    return carry[0].sample


def _branches(guided: bool, conditions: Conditions, latents: Array) -> int:
    return conditions.text.shape[0] // latents.shape[0] if guided else 1


def _begin(denoiser: Denoiser, sampler: Sampler, guided: bool, parameters: Parameters, inputs: Inputs, shortcuts: Shortcuts) -> tuple[Run, Any]:
    """What does not depend on the latents, keys and values of text and identity, features of the pictures, masks, and the embeddings of
    all times; and what the first call begins with: the sampler's state and the memory of shortcuts."""
    conditions, latents, plan = inputs.conditions, inputs.latents, inputs.plan
    kernels = changed_kernels(parameters["unet"], parameters.get("loras", ()))
    unet, nets = _networks(denoiser, parameters, kernels)
    adapter = denoiser.adapter.bind(parameters["adapter"])
    batch = conditions.text.shape[0]
    several = conditions.identity_tokens.ndim == 4
    project, attended, embed = nets[0].project_context, adapter, nets[0].embed_condition
    if several:
        project, attended, embed = jax.vmap(project, 1, 2), jax.vmap(adapter, 1, 2), jax.vmap(embed, 1, 1)
    contexts = [project(conditions.identity_tokens)]
    contexts += [net.project_context(conditions.text, conditions.text_mask) for net in nets[1:]]
    features = [embed(conditions.images[0])]
    features += [net.embed_condition(image) for net, image in zip(nets[1:], conditions.images[1:], strict=True)]
    mask = conditions.control_mask
    levels = len(denoiser.identitynet.config.block_out_channels)
    fixed = Fixed(
        text=unet.project_context(conditions.text, conditions.text_mask),
        identity=attended(conditions.identity_tokens),
        contexts=tuple(contexts),
        features=tuple(jnp.broadcast_to(f, (batch, *f.shape[1:])) for f in features),
        mask=mask,
        masks=None if mask is None else control_masks(mask, (latents.shape[1], latents.shape[2]), levels),
    )
    times = tuple(jax.lax.map(functools.partial(_embed, net, conditions.added, batch), plan.rows["timestep"]) for net in (unet, *nets))
    calls = plan_calls(shortcuts, inputs.pace, times, conditions.control_scales, conditions.adapter_scale)
    state = sampler.init(latents)
    first = jax.tree.map(lambda a: a[0], (plan.rows, calls))
    x = sampler.model_input(state, first[0])
    memory = Predictor(unet, nets, fixed, shortcuts).empty(jnp.concatenate([x] * _branches(guided, conditions, latents)), first[1])
    following = None if inputs.edit is None else {name: jnp.concatenate([column[1:], column[-1:]]) for name, column in plan.rows.items()}
    items = plan.rows, following, calls, jnp.arange(plan.num_calls)
    run = Run(kernels, fixed, items, picture_keys(inputs.seeds), inputs.guidance_scale, inputs.guidance_rescale, inputs.edit)
    return run, (state, memory)


def _advance(
    denoiser: Denoiser, sampler: Sampler, branches: int, parameters: Parameters, shortcuts: Shortcuts, run: Run, carry: Any, item: Any
) -> tuple[Any, Any]:
    """One call: the sampler's state and the memory after it."""
    (state, memory), (row, _, call, index) = carry, item
    predictor = Predictor(*_networks(denoiser, parameters, run.kernels), run.fixed, shortcuts)
    x = sampler.model_input(state, row)
    memory, output = guide(predictor, branches, memory, x, call, run.guidance_scale, run.guidance_rescale)
    noise = _normal(run.keys, index + 1, state.sample.shape[1:]) if sampler.needs_noise else None
    carry = sampler.step(state, output, row, noise), memory
    return carry if run.edit is None else _edited(run.edit, sampler, carry, item)


def _item(run: Run, index: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), run.items)


_begin_alone = jax.jit(_begin, static_argnames=_STATIC)


@functools.partial(jax.jit, static_argnames=("denoiser", "sampler", "branches", "shortcuts"), donate_argnames=("carry",))
def _advance_alone(
    denoiser: Denoiser, sampler: Sampler, branches: int, shortcuts: Shortcuts, parameters: Parameters, run: Run, carry: Any, index: Array
) -> tuple[Any, Array]:
    """The carry after call number `index`, and a number that is there when it is."""
    return _advance(denoiser, sampler, branches, parameters, shortcuts, run, carry, _item(run, index)), index + 1


def _networks(denoiser: Denoiser, parameters: Parameters, kernels: dict[str, Array]) -> tuple[Any, tuple[Any, ...]]:
    """UNet and ControlNets, IdentityNet first, with their parameters; `kernels` are those of the UNet that LoRAs changed."""
    unet = denoiser.unet.bind(with_kernels(parameters["unet"], kernels))
    nets = [denoiser.identitynet.bind(parameters["identitynet"])]
    nets += [n.bind(p) for n, p in zip(denoiser.controlnets, parameters.get("controlnets", ()), strict=True)]
    return unet, tuple(nets)


def _edited(edit: Edit, sampler: Sampler, carry: Any, item: Any) -> Any:
    """The carry after a call, with the picture's own latents, at the noise level that the call came to, outside the mask."""
    (state, memory), (_, following, _, index) = carry, item
    if edit.mask is None:
        return carry
    kept = jnp.where(index + 1 < edit.count, sampler.noised(edit.image, edit.noise, following), edit.image)
    return state._replace(sample=edit.mask * state.sample + (1 - edit.mask) * kept.astype(state.sample.dtype)), memory


def _embed(net: Any, added: AddedConditions, batch: int, timestep: Array) -> Array:
    return net.embed_time(timestep, added, batch)
