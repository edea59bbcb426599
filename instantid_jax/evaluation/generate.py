"""Pictures of many people at once, each kept on disk by what decides it.

The pipeline's call makes pictures of one person. Here every row of a batch has its own person, pose, prompt and seed; only the
two strengths are common. The programs and the arithmetic are the pipeline's own, and a row equals what the pipeline draws for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from instantid_jax import denoise as programs
from instantid_jax.data.drawing import draw_keypoints
from instantid_jax.denoise import Conditions, Denoiser
from instantid_jax.evaluation.store import Store, digest, digest_tree
from instantid_jax.models.encoder import AddedConditions
from instantid_jax.pipeline import InstantIDPipeline, check_call
from instantid_jax.request import Request

__all__ = ["Job", "Painter", "Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What all pictures of an evaluation have in common."""

    size: int
    """Side of the pictures in pixels."""
    steps: int = 25
    guidance_scale: float = 3.0
    sampler: str = "euler"
    keypoint_scale: float = 0.15
    """Size of the drawn keypoints, as in training; 1 is the published drawing, meant for about a thousand pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One picture to make."""

    prompt: str
    embedding: np.ndarray
    """[d]: raw vector of the reference, or the mean of several."""
    keypoints: np.ndarray
    """[5, 2] in pixels of the picture."""
    seed: int
    identitynet: float
    """Strength of IdentityNet."""
    adapter: float
    """Strength of the image adapter."""


class Painter:
    """Makes the pictures of jobs with a pipeline, `batch` at a time, and never one that the store already has."""

    def __init__(self, pipe: InstantIDPipeline, sampling: Sampling, store: Store, batch: int = 20) -> None:
        self.pipe, self.sampling, self.store, self.batch = pipe, sampling, store, batch
        self.weights = digest_tree({"parameters": pipe.parameters})
        """Hash of the model's weights."""

    def key(self, job: Job) -> str:
        """Hash of everything that decides the job's picture."""
        rest = [job.prompt, job.seed, job.identitynet, job.adapter]
        return digest("picture 1", self.weights, dataclasses.asdict(self.sampling), rest, job.embedding, job.keypoints)

    def paint(self, jobs: Sequence[Job]) -> np.ndarray:
        """Pictures [n, s, s, 3] uint8."""
        keys = [self.key(job) for job in jobs]
        found = {key: kept["image"] for key in keys if (kept := self.store.get(key)) is not None}
        groups: dict[tuple[float, float], dict[str, Job]] = {}
        for key, job in zip(keys, jobs, strict=True):
            if key not in found:
                groups.setdefault((job.identitynet, job.adapter), {})[key] = job
        for wanted in groups.values():
            for start in range(0, len(wanted), self.batch):
                part = list(wanted)[start : start + self.batch]
                for key, image in zip(part, self._draw([wanted[key] for key in part]), strict=True):
                    self.store.put(key, {"image": image})
                    found[key] = image
        return np.stack([found[key] for key in keys])

    def _draw(self, jobs: list[Job]) -> np.ndarray:
        """Pictures of at most `batch` jobs of one pair of strengths; a short batch is filled up, so that nothing new is compiled."""
        count = len(jobs)
        jobs = jobs + jobs[:1] * (self.batch - count)
        pipe, sampling = self.pipe, self.sampling
        request = self._request(jobs)
        plan = request.plan
        seeds = np.asarray([job.seed for job in jobs], np.uint32)
        side = sampling.size // pipe.config.vae.downscale
        noise = programs.initial_noise(seeds, (side, side, pipe.config.unet.in_channels)) * plan.init_noise_sigma
        conditions = self._conditions(request, jobs, plan.num_calls)
        denoiser = Denoiser(pipe.networks["unet"], pipe.networks["adapter"], pipe.networks["identitynet"])
        weights = {name: pipe.parameters[name] for name in ("unet", "adapter", "identitynet")} | {"controlnets": ()}
        guidance = jnp.float32(sampling.guidance_scale), jnp.float32(0.0)
        latents = programs.denoise(denoiser, request.solver, request.guided, weights, conditions, noise, seeds, plan, *guidance)
        pictures = np.asarray(programs.decode(pipe.networks["vae"], pipe.parameters["vae"], latents))
        if not np.isfinite(pictures).all():
            raise ValueError("the model draws values that are not finite; load it with dtype float32 or check the weights")
        return np.round(pictures[:count] * 255).astype(np.uint8)

    def _request(self, jobs: list[Job]) -> Request:
        """The pipeline's own check of its arguments, with its defaults for the rest."""
        return check_call(
            self.pipe.config,
            prompt=[job.prompt for job in jobs],
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance_scale,
            sampler=self.sampling.sampler,
            controlnet_conditioning_scale=jobs[0].identitynet,
            ip_adapter_scale=jobs[0].adapter,
        )

    def _conditions(self, request: Request, jobs: list[Job], calls: int) -> Conditions:
        text = self.pipe.encode_text(request)
        tokens = self.pipe.encode_identity(np.stack([job.embedding for job in jobs]), guided=request.guided)
        size = self.sampling.size
        drawn = [draw_keypoints((size, size), job.keypoints, self.sampling.keypoint_scale).astype(np.float32) / 255 for job in jobs]
        sizes = np.repeat(request.time_ids((size, size)), len(jobs), axis=0)
        return Conditions(
            text=text.states,
            text_mask=None,
            added=AddedConditions(text.pooled, jnp.asarray(sizes)),
            identity_tokens=tokens,
            images=(jnp.asarray(np.stack(drawn * (2 if request.guided else 1))),),
            control_scales=jnp.full((calls, 1), jobs[0].identitynet, jnp.float32),
            adapter_scale=jnp.full((calls,), jobs[0].adapter, jnp.float32),
            control_mask=None,
        )
