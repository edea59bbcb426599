"""InstantIDPipeline: from a face embedding, a keypoint picture and a prompt to pictures.

Argument names are those of diffusers' SDXL ControlNet pipeline, so a script ports by changing its import. Unlike there,
pictures and latents are NHWC, `latents` is unit-normal noise, and randomness comes from `seed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from instantid_jax import denoise as programs
from instantid_jax.checkpoint import load_weights
from instantid_jax.config import ComputeConfig, IdentityNetConfig, ModelConfig, from_json
from instantid_jax.denoise import Conditions, Denoiser, Inputs
from instantid_jax.diffusion import make_sampler
from instantid_jax.editing import STRENGTH, Initial, Placed, begin, check_initial
from instantid_jax.foreign import CALL, LOADING, METHODS, refusal
from instantid_jax.lora import LORA_NETWORKS, Lora, check_scales, in_order, merge_lora, stack_lora
from instantid_jax.models import FROZEN, TRAINABLE, Network, build_networks
from instantid_jax.models.encoder import AddedConditions
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.models.tiling import Tiling
from instantid_jax.nn.stacking import layers_apart
from instantid_jax.parallel.distributed import put_whole, to_host
from instantid_jax.parallel.mesh import batch_sharding
from instantid_jax.parallel.rules import shardings
from instantid_jax.people import MOST_PEOPLE, check_people, control_pictures, with_people
from instantid_jax.request import CHECKED, PipelineError, Request
from instantid_jax.strengths import StrengthError, read_strength
from instantid_jax.text import Tokenizer, TokenizerWarning
from instantid_jax.text.weighting import apply_weights, encode_weighted, flatten_groups

__all__ = ["InstantIDPipeline", "PipelineError", "PipelineOutput", "check_call", "read_config", "read_controlnet_config"]

NETWORKS = (*FROZEN, *TRAINABLE)
_IMPORT = "python -m convert_weights import"
C = TypeVar("C", ModelConfig, IdentityNetConfig)


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """`images`: a list of PIL pictures, an array [b, H, W, 3] in [0, 1], or latents [b, h, w, c], by `output_type`."""

    images: Any


class TextConditions(NamedTuple):
    """Encoded prompts: the unconditional rows, if any, before the conditional ones."""

    states: jax.Array
    pooled: jax.Array
    mask: jax.Array | None


class InstantIDPipeline:
    """A whole InstantID model: weights, tokenizers, and the calls that make pictures.

    `parameters` maps each network's name to its tree of arrays; `controlnets` are stock SDXL ControlNets beside
    IdentityNet, as (network, parameters). With `int8` the trees of UNet and IdentityNet hold 8-bit kernels (`nn.linear.quantize`).
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, Any],
        tokenizers: tuple[Tokenizer, Tokenizer],
        *,
        compute: ComputeConfig | None = None,
        controlnets: Sequence[tuple[Network, Any]] = (),
        int8: bool = False,
    ):
        compute = compute or ComputeConfig()
        # SDXL's autoencoder overflows in float16, which is what `force_upcast` says.
        vae_dtype = "float32" if config.vae.force_upcast and compute.dtype == "float16" else compute.dtype
        self.config, self.parameters, self.tokenizers = config, parameters, tokenizers
        self.networks = build_networks(config, compute, dataclasses.replace(compute, dtype=vae_dtype), int8=int8)
        self.controlnets = tuple(controlnets)
        self.ip_adapter_scale = 0.5
        places = {leaf.sharding for leaf in jax.tree.leaves(parameters) if isinstance(leaf, jax.Array)}
        meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
        self.mesh = next((mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh)), None)
        self._loras: list[tuple[Lora, dict[str, Any]]] = []
        self.lora_scales: list[float] = []
        missing = [name for name in NETWORKS if name not in parameters]
        if missing:
            raise PipelineError(f"the model lacks the weights of {', '.join(missing)}")

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        controlnets: Sequence[str | Path] = (),
        attention: str = "auto",
        weights_dtype: str | None = None,
        loras: Sequence[Lora] = (),
        lora_scales: Sequence[float] = (),
        **foreign: Any,
    ) -> InstantIDPipeline:
        """Loads what ``python -m convert_weights import`` wrote.

        `dtype` is that of weights and arithmetic: "float32", "bfloat16" or "float16". `weights_dtype` "int8" holds the kernels
        of UNet, IdentityNet and other ControlNets in 8 bits (docs/speed.md); arithmetic stays in `dtype`. With a `mesh` the weights are
        spread over its devices, and the pictures of a call where they divide evenly; of several processes all make the same
        calls, and all get all pictures. `controlnets` are folders that ``import --controlnet`` wrote. `loras`
        (`convert_weights.lora.read_lora`) are merged into the weights for good, at strengths of 1 where `lora_scales` says
        nothing; `set_loras` keeps them apart.
        """
        _refuse(cls.from_pretrained, foreign, LOADING, "from_pretrained")
        directory, compute = Path(directory), ComputeConfig(dtype=dtype, attention=attention)
        if weights_dtype not in (None, "int8"):
            raise PipelineError(f"weights_dtype must be 'int8' or None (the weights then have dtype), not {weights_dtype!r}")
        int8 = weights_dtype == "int8"
        config, folders = read_config(directory), [Path(folder) for folder in controlnets]
        extra = [Network(IdentityNet, read_controlnet_config(folder), compute, int8) for folder in folders]
        networks = build_networks(config, compute, int8=int8)
        merged = list(loras), check_scales(loras, lora_scales)
        parameters = {name: _load(directory / name, networks[name], name, dtype, mesh, *merged) for name in NETWORKS}
        loaded = [(n, _load(folder / "controlnet", n, "controlnet", dtype, mesh)) for n, folder in zip(extra, folders, strict=True)]
        tokenizers = (Tokenizer.from_directory(directory / "tokenizer"), Tokenizer.from_directory(directory / "tokenizer_2"))
        return cls(config, parameters, tokenizers, compute=compute, controlnets=loaded, int8=int8)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Names of diffusers' pipelines that are not here are refused with what to use instead."""
            instead = f"; in its place: {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"{type(self).__name__} has no {name!r}{instead}", name=name, obj=self)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Strength of the image adapter in calls that do not give `ip_adapter_scale` (0.5 after loading, as published)."""
        try:
            read_strength(scale)
        except StrengthError as error:
            raise PipelineError(f"scale {error}") from error
        self.ip_adapter_scale = scale

    def set_loras(self, loras: Sequence[Lora], scales: Sequence[float] = ()) -> None:
        """LoRAs beside the weights from the next call on, in the place of earlier ones; none takes them away.

        Another choice of LoRAs compiles anew, other strengths (`set_lora_scales`) do not. Each call makes the changed weights
        for itself: their memory is needed twice while it runs. Raises `LoraError` for a LoRA of another model.
        """
        if loras and self.networks["unet"].int8:
            raise PipelineError("LoRAs cannot be kept apart from weights in 8 bits; give them to from_pretrained, which merges them first")
        abstract = {name: self.networks[name].abstract for name in LORA_NETWORKS}
        stacks = [{name: jax.device_put(stack_lora(factors, abstract[name])) for name, factors in lora.networks.items()} for lora in loras]
        self.lora_scales = check_scales(loras, scales)
        self._loras = list(zip(loras, stacks, strict=True))

    def set_lora_scales(self, scales: Sequence[float]) -> None:
        """Other strengths of the LoRAs that `set_loras` took, in its order. Raises `LoraError` for another number of them."""
        self.lora_scales = check_scales([lora for lora, _ in self._loras], scales)

    def _apart(self, network: str) -> tuple[Any, ...]:
        """What `lora.apply_loras` adds to a network."""
        order = in_order([lora for lora, _ in self._loras], self.lora_scales)
        stacks = {id(lora): stack for lora, stack in self._loras}
        return tuple((stacks[id(lora)][network], jnp.float32(scale)) for lora, scale in order if network in lora.networks)

    def num_calls(self, sampler: str, num_inference_steps: int) -> int:
        """Model calls that so many steps take: the same number, but for Heun about twice as many."""
        return make_sampler(sampler, self.config.scheduler).plan(num_inference_steps).num_calls

    def encode_text(self, request: Request) -> TextConditions:
        """Text states and pooled states of the request's prompts, both CFG halves."""
        return self._encode_weighted(request) if request.prompt_weighting else self._encode_plain(request)

    def _encode_plain(self, request: Request) -> TextConditions:
        """SDXL's own encoding: 77 tokens, the two towers' states before their last layers side by side."""

        def both(first: list[str], second: list[str], skip: int) -> tuple[jax.Array, jax.Array]:
            states, pooled = [], None
            for tower, tokenizer, texts in zip(("text_encoder", "text_encoder_2"), self.tokenizers, (first, second), strict=True):
                report_truncation(tokenizer, texts if tower == "text_encoder" or second != first else [])
                out = self._encoded(tower, tokenizer.encode(texts))
                states.append(out.hidden[-(skip + 2)])
                pooled = out.pooled
            assert pooled is not None
            return jnp.concatenate(states, axis=-1), pooled

        states, pooled = both(request.prompts, request.prompts_2, request.clip_skip)
        if request.guided:
            if request.negative_prompts is None and self.config.force_zeros_for_empty_prompt:
                empty, empty_pooled = jnp.zeros_like(states), jnp.zeros_like(pooled)
            else:
                negatives = request.negative_prompts or [""] * len(request.prompts)
                empty, empty_pooled = both(negatives, request.negative_prompts_2 or negatives, 0)
            states, pooled = jnp.concatenate([empty, states]), jnp.concatenate([empty_pooled, pooled])
        return TextConditions(states, pooled, None)

    def _encoded(self, tower: str, ids: np.ndarray) -> Any:
        """States of one text tower, on this process's devices."""
        with self._on_mesh():
            return _near(programs.encode_text(self.networks[tower], self.parameters[tower], ids, self._apart(tower)))

    def _encode_weighted(self, request: Request) -> TextConditions:
        """The long-prompt path of the published full pipeline: weights, BREAK, any length; padding is masked out."""
        negatives = request.negative_prompts or [""] * len(request.prompts)
        pairs = [encode_weighted(self.tokenizers[0], p, n) for p, n in zip(request.prompts, negatives, strict=True)]
        halves = ([n for _, n in pairs] if request.guided else []) + [p for p, _ in pairs]
        groups = max(half.ids.shape[0] for half in halves)
        states, pooled, masks = [], [], []
        for half in halves:
            towers = [self._encoded(tower, half.ids) for tower in ("text_encoder", "text_encoder_2")]
            hidden = jnp.concatenate([out.hidden[-2] for out in towers], axis=-1)
            flat, mask = flatten_groups(apply_weights(hidden, half.weights, half.lengths), half.lengths)
            short = groups * 77 - flat.shape[0]
            states.append(jnp.pad(flat, ((0, short), (0, 0))))
            masks.append(jnp.pad(mask, (0, short)))
            pooled.append(towers[1].pooled[-1])
        return TextConditions(jnp.stack(states), jnp.stack(pooled), jnp.stack(masks))

    def encode_identity(self, embeddings: np.ndarray, *, guided: bool, negative: np.ndarray | None = None) -> jax.Array:
        """Identity tokens of embeddings [b, d]; with guidance those of `negative` [b, d], by default of zero vectors, come first."""
        embeddings = np.asarray(embeddings, np.float32)
        if guided:
            embeddings = np.concatenate([np.zeros_like(embeddings) if negative is None else negative, embeddings])
        with self._on_mesh():
            return _near(programs.encode_identity(self.networks["resampler"], self.parameters["resampler"], embeddings))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        image_embeds: Any = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        identity_guidance_scale: float | None = None,
        negative_identity_noise: float = 0.0,
        negative_identity_seed: int = 0,
        controlnet_conditioning_scale: Any = 1.0,
        ip_adapter_scale: Any = None,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        control_mask: Any = None,
        people: Any = None,
        max_people: int = MOST_PEOPLE,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Any = None,
        init_image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        mask_blur: float = 0.0,
        keep_unmasked: bool = True,
        sample_mode: str = "sample",
        sampler: str = "euler",
        sampler_options: dict[str, Any] | None = None,
        cache_interval: int = 1,
        cache_branch_id: int = 0,
        control_interval: int = 1,
        clip_skip: int | None = 0,
        prompt_weighting: bool = False,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        vae_tiling: str | None = None,
        vae_tile_size: int | None = None,
        output_type: str = "pil",
        on_step: Callable[[int], None] | None = None,
        **foreign: Any,
    ) -> PipelineOutput:
        """Makes ``len(prompts) * num_images_per_prompt`` pictures.

        Args:
            prompt: text, or one text for each picture (times `num_images_per_prompt`).
            image: keypoint picture (`face.draw_kps`): PIL, uint8 [H, W, 3], or float [H, W, 3] in [0, 1]. A list, that of
                IdentityNet first, when the pipeline has other ControlNets.
            image_embeds: raw face embedding [d], or [k, d] photos of one person, which are averaged.
            negative_prompt: None is zeros where the model says so (SDXL base does), which is not the same as "".
            height, width: pixels, multiples of 8; the control picture's by default.
            guidance_scale: classifier-free guidance; at most 1 switches it off.
            guidance_start, guidance_end: window of the steps, as fractions, that are guided; outside it only the conditional half is
                computed (docs/speed.md says what this and the three intervals save, and what they do to pictures).
            identity_guidance_scale: guides the identity apart from the text, at half as much again for each step (docs/strengths.md).
            negative_identity_noise, negative_identity_seed: the unconditional branch is given that much noise as identity, zeros by default.
            controlnet_conditioning_scale: strength of IdentityNet, with other ControlNets a list: numbers, or schedules over steps, layers
                and places, such as "linear(1, 0.3)" (`strengths`, docs/strengths.md); of one net too a list is of nets, so one over steps is [[...]].
            ip_adapter_scale: strength of the image adapter, likewise, or a list over steps; None takes `set_ip_adapter_scale`'s.
            control_guidance_start, control_guidance_end: window of the steps, as fractions, in which the nets act; their strengths are
                multiplied by it. Outside it, and at strength 0, they are not computed.
            control_mask: where IdentityNet and the adapter act: PIL or [H, W] or [H, W, 3], 0 to 255 or 0.0 to 1.0. Integers other
                than uint8 that are only 0 and 1 count as 0.0 and 1.0. Or a box in pixels, (left, top, right, bottom), cut off at the
                picture's edges: with a face's box it is the published demo's "enhance non-face region".
            people: several people (`people.Person`) in the place of `image`, `image_embeds` and `control_mask`: each has them for itself. With
                other ControlNets `image` is their pictures.
            max_people: how many people the program is compiled for. Up to so many compile nothing new, and cost only themselves.
            seed: picture i of the call has seed + i, so each can be made again alone.
            latents: unit-normal noise [b, h, w, c] in place of the seed's.
            init_image: a picture that is changed, in the place of noise alone: PIL or an array as `image`. It is resized to the output's size.
            strength: how much of it is changed, above 0 to 1: of the steps the last ``int(num_inference_steps * strength)`` are made. By
                default 0.8. Windows, schedules of strengths and intervals are of the steps that are made. Another strength compiles nothing.
            mask_image: where it is changed: as `control_mask`, white where it is redrawn; a picture of another size is resized.
            mask_blur: radius in pixels of a Gaussian blur of the mask, which makes the edge of `keep_unmasked` soft.
            keep_unmasked: whether pixels outside the mask stay exactly those of `init_image`; where the mask is gray, in part.
            sample_mode: "sample" draws the picture's latents from the autoencoder's distribution, with the seed; "argmax" takes its mean.
            sampler: one of `diffusion.SAMPLERS`.
            sampler_options: what `diffusion.make_sampler` describes, such as {"karras": True}, or {"final_sigmas_type": "sigma_min"}
                for the last noise level of diffusers 0.25.
            cache_interval: every so many model calls the UNet is computed whole, in between its outermost layers alone (DeepCache).
            cache_branch_id: how far these reach: 0 is one skip connection, the UNet has `num_skips`.
            control_interval: every so many model calls IdentityNet and other ControlNets are computed.
            clip_skip: text layers to leave out, counted from the last but one; None is 0.
            prompt_weighting: the published full pipeline's prompt syntax and unlimited length.
            original_size, crops_coords_top_left, target_size: SDXL's micro-conditioning, heights first. As in diffusers the negative
                ones count only where both negative sizes are given, with a crop at (0, 0) by default; else they are the positive ones.
            vae_tiling: decodes large pictures in tiles: "even" is nearer to the picture without, "diffusers" is diffusers' own layout.
            vae_tile_size: side of a tile in pixels, a multiple of four latent pixels; the size that the autoencoder was trained for by default.
            output_type: "pil", "np" or "latent".
            on_step: called with the number of each finished model call. What it raises ends the run and is raised here.
                Steps are then a program each, of the same numbers. Of several processes all must give one, or none.
            foreign: nothing is taken; a name of diffusers' is refused with what to use instead.

        Raises:
            PipelineError: an argument is out of range or of the wrong shape; nothing has been compiled by then.
        """
        initial = check_initial(init_image, strength, mask_image, mask_blur, keep_unmasked, sample_mode)
        strength = STRENGTH if initial is not None and strength is None else strength
        arguments = {k: v for k, v in locals().items() if k in CHECKED}
        _refuse(self.__call__, foreign, CALL, "the pipeline")
        if on_step is not None and not callable(on_step):
            raise PipelineError(f"on_step must be a function of the number of the finished model call, not {on_step!r}")
        request = Request.check(self.config, **arguments, nets=1 + len(self.controlnets))
        inputs = self.prepare(request, image, image_embeds, control_mask, latents, people=people, max_people=max_people, initial=initial)
        placed = None if initial is None else initial.placed(request, self._size(inputs))
        denoiser, weights = self.denoiser()
        arguments, shortcuts = (denoiser, request.solver, request.guided, weights), request.shortcuts
        with self._on_mesh():
            if on_step is None:
                out = programs.denoise(*arguments, *self._spread(inputs), shortcuts=shortcuts)
            else:
                out = programs.denoise_watched(*arguments, self._spread(inputs), shortcuts, on_step)
        return PipelineOutput(self._finish(out, output_type, request.tiling, placed))

    def denoiser(self) -> tuple[Denoiser, dict[str, Any]]:
        """The networks of every denoising step, and their weights."""
        nets, loras = tuple(n for n, _ in self.controlnets), self._apart("unet")
        weights = {k: self.parameters[k] for k in ("unet", "adapter", "identitynet")}
        weights |= {k: layers_apart(weights[k]) for k in ("unet", "identitynet") if not loras and not self.networks[k].int8}
        denoiser = Denoiser(self.networks["unet"], self.networks["adapter"], self.networks["identitynet"], nets)
        return denoiser, weights | {"controlnets": tuple(p for _, p in self.controlnets), "loras": loras}

    def prepare(
        self,
        request: Request,
        image: Any,
        image_embeds: Any,
        control_mask: Any = None,
        latents: Any = None,
        *,
        people: Any = None,
        max_people: int = MOST_PEOPLE,
        initial: Initial | None = None,
    ) -> Inputs:
        """Everything that `denoise` takes for a checked request; the rest is as in the call.

        `initial` is the picture to begin with (`editing.check_initial`).
        """
        width, down = self.config.resampler.embedding_dim, self.config.vae.downscale
        if people is not None:
            image = control_pictures(people, image, image_embeds, control_mask)
        images = request.control_images(image, down)
        size = images[0].shape[0], images[0].shape[1]
        several = None if people is None else check_people(people, max_people, request, size, width)
        embeddings, mask = several.embeddings if several else request.embeddings(image_embeds, width), request.mask(control_mask, size)
        shape = (size[0] // down, size[1] // down, self.config.unet.in_channels)
        seeds, plan = request.seeds(), request.plan
        noise = programs.initial_noise(seeds, shape) if latents is None else request.latents(latents, shape)
        conditions = self._conditions(request, images, embeddings, mask)
        conditions = conditions if several is None else with_people(conditions, several)
        start, scale = jnp.asarray(noise) * plan.init_noise_sigma, np.asarray(request.guidance_scale, np.float32)
        guidance = jnp.asarray(scale if request.branches > 2 else scale[0]), jnp.float32(request.guidance_rescale)
        inputs = Inputs(conditions, start, jnp.asarray(seeds), plan, *guidance, request.pace())
        return inputs if initial is None else self._begin(inputs, request, initial, noise)

    def _size(self, inputs: Inputs) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return inputs.latents.shape[1] * self.config.vae.downscale, inputs.latents.shape[2] * self.config.vae.downscale

    def _begin(self, inputs: Inputs, request: Request, initial: Initial, noise: Any) -> Inputs:
        """The same inputs for a call that changes a picture."""
        placed = initial.placed(request, self._size(inputs))
        draws = programs.encoding_noise(request.seeds(), inputs.latents.shape[1:]) if initial.sample_mode == "sample" else None
        with self._on_mesh():
            encoded = _near(programs.encode(self.networks["vae"], self.parameters["vae"], placed.picture[None], draws, request.tiling))
        return begin(inputs, request, placed, encoded, noise)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Where layers see the mesh that the weights are spread over (`nn.placement`)."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _spread(self, inputs: Inputs) -> Inputs:
        """With weights spread over a mesh: the pictures of a batch too, where their number can be divided by its data and fsdp axes."""
        if self.mesh is None:
            return inputs
        count, conditions = len(inputs.seeds), inputs.conditions
        replicated = NamedSharding(self.mesh, PartitionSpec())
        rows = batch_sharding(self.mesh) if count % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0 else replicated
        places = jax.tree.map(lambda _: replicated, inputs)
        split = {name: jax.tree.map(lambda _: rows, getattr(conditions, name)) for name in ("text", "text_mask", "added", "identity_tokens")}
        places = places._replace(conditions=places.conditions._replace(**split), latents=rows, seeds=rows)
        if places.edit is not None:
            places = places._replace(edit=places.edit._replace(image=rows, noise=rows))
        return jax.tree.map(put_whole, inputs, places)

    def _conditions(self, request: Request, images: list[np.ndarray], embeddings: np.ndarray, mask: np.ndarray | None) -> Conditions:
        control, adapter = request.strengths(self.ip_adapter_scale)
        if control.shape[2] > 1:
            if mask is None:
                raise PipelineError("a strength outside needs a control_mask, which says where that is")
            mask = np.stack([mask, 1 - mask], axis=-1)
        text, rows = self.encode_text(request), embeddings.reshape(-1, embeddings.shape[-1])
        tokens = self.encode_identity(rows, guided=request.guided, negative=request.negative_identities(rows))
        if embeddings.ndim == 2:
            tokens = tokens.reshape(-1, len(embeddings), *tokens.shape[1:])
        if request.branches > 2:  # between the two halves one with the text alone
            text = jax.tree.map(lambda x: jnp.concatenate([x, x[len(x) // 2 :]]), text)
            tokens = jnp.concatenate([tokens[:1], tokens])
        repeats = request.num_images_per_prompt

        def spread(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, repeats, axis=0)

        size = images[0].shape[:2]
        sizes = np.repeat(request.time_ids(size), request.batch, axis=0)
        return Conditions(
            text=spread(text.states),
            text_mask=None if text.mask is None else spread(text.mask),
            added=AddedConditions(spread(text.pooled), jnp.asarray(sizes)),
            identity_tokens=jnp.repeat(tokens, request.batch, axis=0),
            images=tuple(jnp.asarray(i)[None] for i in images),
            control_scales=jnp.asarray(control),
            adapter_scale=jnp.asarray(adapter),
            control_mask=None if mask is None else jnp.asarray(mask)[None],
        )

    def _finish(self, latents: jax.Array, output_type: str, tiling: Tiling | None, placed: Placed | None = None) -> Any:
        if not np.isfinite(denoised := to_host(latents)).all():
            raise PipelineError(
                "the denoising networks gave values that are not finite; load the model with dtype='float32' or 'bfloat16', or check its weights"
            )
        if output_type == "latent":
            return denoised
        with self._on_mesh():
            pictures = to_host(programs.decode(self.networks["vae"], self.parameters["vae"], latents, tiling))
        if not np.isfinite(pictures).all():
            raise PipelineError("the autoencoder gave values that are not finite; load the model with dtype='float32' or 'bfloat16'")
        pictures = pictures if placed is None else placed.finished(pictures)
        if output_type == "np":
            return pictures
        return [Image.fromarray(np.round(p * 255).astype(np.uint8)) for p in pictures]


def _near(tree: Any) -> Any:
    """Results as arrays of this process alone, where other processes take part in making them."""
    return tree if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)) else to_host(tree)


def _refuse(function: Callable[..., Any], foreign: dict[str, Any], instead: dict[str, str], owner: str) -> None:
    """Raises `PipelineError` for the first argument that `function` does not name."""
    for name in foreign:
        raise PipelineError(refusal(name, instead, inspect.signature(function).parameters.keys() - {"foreign"}, owner))


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a folder of converted weights. Raises `PipelineError` where there is none, it is damaged, or a ControlNet's."""
    return _read_config(directory, ModelConfig, "model")


def read_controlnet_config(directory: Path) -> IdentityNetConfig:
    """The same of a converted ControlNet."""
    return _read_config(directory, IdentityNetConfig, "controlnet")


# By the kind that a folder's manifest says: what it is, and what makes one.
_KINDS = {"model": ("a folder of converted weights", _IMPORT), "controlnet": ("a converted ControlNet", f"{_IMPORT} --controlnet")}


def _read_config(directory: Path, cls: type[C], kind: str) -> C:
    (what, command), path = _KINDS[kind], directory / "config.json"
    if not path.is_file():
        raise PipelineError(f"{directory} is not {what} (no config.json); make one with: {command}")
    found = _kind(directory)
    if found in _KINDS and found != kind:
        place = "controlnets (--controlnet)" if found == "controlnet" else "the model (--weights)"
        raise PipelineError(f"{directory} is {_KINDS[found][0]}, not {what}; give it as {place}, and here what is made with: {command}")
    try:
        content = path.read_text(encoding="utf-8")
        published = json.loads(content)
        if isinstance(published, dict) and "_class_name" in published:
            raise PipelineError(f"{directory} is a published {published['_class_name']}, which is not converted yet; do so with: {command}")
        return from_json(cls, content)
    except PipelineError:
        raise
    except ValueError as error:
        raise PipelineError(f"{path} is damaged ({error}); convert or copy the weights again") from error


def _kind(directory: Path) -> str | None:
    """What the folder's manifest says it is; None where there is no manifest that says so."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(manifest.get("kind")) if isinstance(manifest, dict) else None


def check_call(config: ModelConfig, *, nets: int = 1, **arguments: Any) -> Request:
    """Checks arguments of a call before a model is there, with the call's own defaults for the rest. Raises `PipelineError`."""
    defaults = {name: p.default for name, p in inspect.signature(InstantIDPipeline.__call__).parameters.items() if name in CHECKED}
    return Request.check(config, nets=nets, **defaults | arguments)


def report_truncation(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Warns (`TokenizerWarning`) of every text that is longer than the tokenizer's window, with the words that are left out."""
    for text in texts:
        cut = tokenizer.truncated(text)
        if cut:
            message = f"the prompt has more than {tokenizer.length} tokens; left out: {cut!r}. prompt_weighting=True reads prompts of any length"
            warnings.warn(message, TokenizerWarning, stacklevel=4)


def _load(
    directory: Path, network: Network, name: str, dtype: str, mesh: jax.sharding.Mesh | None, loras: Sequence[Lora] = (), scales: Sequence[float] = ()
) -> Any:
    """One network's weights on the devices: everywhere without a mesh, spread over it by the sharding rules with one."""
    # 8-bit kernels are rounded from what is stored, not from what that is cast to.
    stored = load_weights(directory, dtype=None if network.int8 else dtype, later=True)
    tree = network.from_disk(merge_lora(stored, name, loras, scales), name)
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(put_whole, tree, shardings(network.abstract, mesh))
