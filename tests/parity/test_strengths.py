"""Strengths over steps and layers against diffusers' own ControlNet pipeline: its windows, and strengths that its callback changes after
every step. What it cannot do (strengths by residual and by place, a negative identity, text and identity guided apart) is written out.

The nets are the golden case's; the pipeline's prompt embeddings hold the identity tokens after the text's, as the published one hands
them to its UNet, and its ControlNet is given those alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLControlNetPipeline
from oracle import error, nchw, nhwc
from test_whole_pipeline import NEGATIVE, PROMPT, SIDE, TOKENS, Reference, a_mask, resampler
from torch.nn.functional import interpolate

from convert_weights.__main__ import main as convert
from instantid_jax.pipeline import InstantIDPipeline
from instantid_jax.strengths import adapter_places, control_places

BOUND, STEPS, GUIDANCE = 1e-4, 5, 4.0

# diffusers 0.42 calls numpy 2 in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def reference(golden_snapshot: Path) -> Reference:
    return Reference(golden_snapshot)


@pytest.fixture(scope="module")
def diffusers_pipeline(reference: Reference, golden_snapshot: Path) -> StableDiffusionXLControlNetPipeline:
    vae, net = AutoencoderKL.from_pretrained(golden_snapshot / "base/vae"), reference.nets[0]
    whole = net.forward

    def of_identity(sample: Any, timestep: Any, encoder_hidden_states: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        return whole(sample, timestep, encoder_hidden_states[:, -TOKENS:], *rest, **keywords)

    pipeline = StableDiffusionXLControlNetPipeline(vae, None, None, None, None, reference.unet, net, reference.scheduler)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    net.forward = of_identity  # type: ignore[method-assign]
    return pipeline


@pytest.fixture(scope="module")
def pipe(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> InstantIDPipeline:
    out = tmp_path_factory.mktemp("strengths")
    assert convert(["import", "--base", str(golden_snapshot / "base"), "--instantid", str(golden_snapshot / "instantid"), "--out", str(out)]) == 0
    return InstantIDPipeline.from_pretrained(out)


class Golden:
    """The golden case's inputs."""

    def __init__(self) -> None:
        with np.load(Path(__file__).parents[1] / "golden/dev/golden.npz") as golden:
            self.keypoints, self.noise = golden["kps_image"], golden["latents"].astype(np.float32)
            self.embedding = golden["emb"].astype(np.float32)


def ours(pipe: InstantIDPipeline, **changes: Any) -> np.ndarray:
    g = Golden()
    given = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "controlnet_conditioning_scale": 0.8, "ip_adapter_scale": 0.8} | changes
    noise = g.noise.transpose(0, 2, 3, 1)
    return pipe(PROMPT, g.keypoints, g.embedding, negative_prompt=NEGATIVE, latents=noise, output_type="latent", **given).images


def theirs(pipeline: StableDiffusionXLControlNetPipeline, reference: Reference, adapter: np.ndarray, **changes: Any) -> np.ndarray:
    """`adapter` [steps, sites]: strengths that a callback sets after every step."""
    g = Golden()
    text, pooled = reference.text()
    embedding = torch.from_numpy(g.embedding)
    identity = resampler(reference.image_proj, torch.stack([torch.zeros_like(embedding), embedding]))
    both = torch.cat([text, identity], dim=1)

    def set_strengths(step: int) -> None:
        for site, scale in zip(reference.sites, adapter[step], strict=True):
            site.region, site.scale = None, float(scale)

    def after(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        set_strengths(min(step + 1, len(adapter) - 1))
        return values

    set_strengths(0)
    out = pipeline(
        prompt_embeds=both[1:], negative_prompt_embeds=both[:1], pooled_prompt_embeds=pooled[1:], negative_pooled_prompt_embeds=pooled[:1],
        image=nchw(g.keypoints[None] / np.float32(255)), latents=torch.from_numpy(g.noise), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type="latent", callback_on_step_end=after, **{"controlnet_conditioning_scale": 0.8} | changes,
    )  # fmt: skip
    return nhwc(out.images)


def straight(first: float, last: float) -> np.ndarray:
    return np.linspace(first, last, STEPS)


CURVE = 0.2 + 0.8 * (1 - np.cos(np.pi * np.arange(STEPS) / (STEPS - 1))) / 2
LIST = [1.0, 0.7, 0.0, 0.4, 1.2]
FULL = np.full(STEPS, 0.8)


@pytest.mark.parametrize(
    ("given", "strengths"),
    [
        (LIST, LIST),
        (str(LIST), LIST),
        ("linear(1, 0.3)", straight(1, 0.3)),
        ("cosine(0.2, 1)", CURVE),
        ("1.0 until 0.5 then 0.2", [1, 1, 0.2, 0.2, 0.2]),
        ("0 until 0.4 then linear(1, 0)", [0, 0, 1, 0.5, 0]),
    ],
    ids=str,
)
def test_the_adapter_over_steps_is_a_callback_of_diffusers(
    given: Any, strengths: Any, pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference
) -> None:
    sites = len(reference.sites)
    expected = theirs(diffusers_pipeline, reference, np.repeat(np.asarray(strengths)[:, None], sites, axis=1))
    assert error(ours(pipe, ip_adapter_scale=given), expected) <= BOUND
    assert error(ours(pipe), expected) > 10 * BOUND


def test_the_adapter_over_layers_is_a_callback_of_diffusers(pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference) -> None:
    table = np.tile(FULL[:, None], (1, len(reference.sites)))
    for i, place in enumerate(adapter_places(pipe.config.unet)):
        table[:, i] = 1 if place == "mid" else 1.5 if place == "up0.1" else straight(1, 0) if place.startswith("up") else 0.8
    expected = theirs(diffusers_pipeline, reference, table)
    assert error(ours(pipe, ip_adapter_scale="down=0.8, mid=1, up=linear(1,0), up0.1=1.5"), expected) <= BOUND
    assert error(ours(pipe), expected) > 10 * BOUND


@pytest.mark.parametrize(
    ("window", "given"),
    [
        ((0.2, 0.8), {"control_guidance_start": 0.2, "control_guidance_end": 0.8}),
        ((0.2, 0.8), {"controlnet_conditioning_scale": "0 until 0.2 then 0.8 until 0.8 then 0"}),
        ((0.0, 0.5), {"controlnet_conditioning_scale": "0.8 until 0.5 then 0"}),
        ((0.3, 0.9), {"control_guidance_start": 0.3, "controlnet_conditioning_scale": "0.8 until 0.9 then 0"}),
        ((0.4, 0.6), {"controlnet_conditioning_scale": [[0, 0, 0.8, 0, 0]]}),
    ],
    ids=str,
)
def test_identitynet_in_a_window_of_diffusers(
    window: tuple[float, float], given: dict[str, Any], pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference
) -> None:
    table = np.repeat(FULL[:, None], len(reference.sites), axis=1)
    expected = theirs(diffusers_pipeline, reference, table, control_guidance_start=window[0], control_guidance_end=window[1])
    assert error(ours(pipe, **given), expected) <= BOUND
    assert error(ours(pipe), expected) > 10 * BOUND


# --- what diffusers' pipeline cannot do, written out


def written_out(
    reference: Reference, control: np.ndarray, adapter: np.ndarray, negative: np.ndarray, guidance: tuple[float, float], mask: np.ndarray | None
) -> np.ndarray:
    """Three branches: the negative ones, the text with the negative identity, text and identity. `control` [steps, sides, residuals] and
    `adapter` [steps, sides, sites] are strengths inside and outside of the mask.
    """
    g = Golden()
    text, pooled = reference.text()
    text, pooled = text[[0, 1, 1]], pooled[[0, 1, 1]]
    vectors = torch.from_numpy(np.stack([negative, negative, g.embedding]))
    identity = resampler(reference.image_proj, vectors)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 3, dtype=torch.float32)}
    picture = nchw(np.stack([g.keypoints / np.float32(255)] * 3))
    region = torch.ones(SIDE, SIDE) if mask is None else torch.from_numpy(mask)
    scheduler = reference.scheduler
    scheduler.set_timesteps(STEPS)
    latents = torch.from_numpy(g.noise) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        for i, site in enumerate(reference.sites):
            site.region, site.scale, site.outside = region, float(adapter[step, 0, i]), float(adapter[step, 1, i])
        x = scheduler.scale_model_input(torch.cat([latents] * 3), t)
        padded = torch.cat([torch.zeros_like(identity), identity], dim=1)  # the net takes the last tokens alone
        down, mid = reference.nets[0](x, t, padded, picture, 1.0, added_cond_kwargs=added, return_dict=False)
        residuals = []
        for i, r in enumerate([*down, mid]):
            at = interpolate(region[None, None], size=r.shape[-2:], mode="bilinear", align_corners=False)
            residuals.append(r * (float(control[step, 0, i]) * at + float(control[step, 1, i]) * (1 - at)))
        both = torch.cat([text, identity], dim=1)
        given = {"down_block_additional_residuals": tuple(residuals[:-1]), "mid_block_additional_residual": residuals[-1]}
        nobody, words, person = reference.unet(x, t, both, added_cond_kwargs=added, **given).sample.chunk(3)
        output = nobody + guidance[0] * (words - nobody) + guidance[1] * (person - words)
        latents = scheduler.step(output, t, latents).prev_sample
    return nhwc(latents)


def constant(pipe: InstantIDPipeline) -> tuple[np.ndarray, np.ndarray]:
    """Both tables at 0.8 inside and nothing outside."""
    tables = np.zeros((STEPS, 2, len(control_places(pipe.config.identitynet)))), np.zeros((STEPS, 2, len(adapter_places(pipe.config.unet))))
    for table in tables:
        table[:, 0] = 0.8
    return tables


def noise_of(pipe: InstantIDPipeline, strength: float, seed: int) -> np.ndarray:
    return (strength * np.random.default_rng(seed).random(pipe.config.resampler.embedding_dim)).astype(np.float32)


@torch.no_grad()
def test_text_and_identity_guided_apart(pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference) -> None:
    zeros = np.zeros_like(Golden().embedding)
    expected = written_out(reference, *constant(pipe), zeros, (6.0, 2.0), None)
    assert error(ours(pipe, guidance_scale=6.0, identity_guidance_scale=2.0), expected) <= BOUND
    assert error(ours(pipe, guidance_scale=6.0), expected) > 10 * BOUND
    alike = written_out(reference, *constant(pipe), zeros, (6.0, 6.0), None)
    assert error(ours(pipe, guidance_scale=6.0), alike) <= BOUND


@torch.no_grad()
def test_noise_as_the_negative_identity(pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference) -> None:
    expected = written_out(reference, *constant(pipe), noise_of(pipe, 2.0, 7), (GUIDANCE, GUIDANCE), None)
    assert error(ours(pipe, negative_identity_noise=2.0, negative_identity_seed=7), expected) <= BOUND
    assert error(ours(pipe), expected) > 10 * BOUND


@torch.no_grad()
def test_everything_at_once(pipe: InstantIDPipeline, diffusers_pipeline: Any, reference: Reference) -> None:
    """Layers, steps, both sides of a mask, a window, noise, and guidance by branch."""
    control, adapter = constant(pipe)
    for i, place in enumerate(control_places(pipe.config.identitynet)):
        control[:, 0, i] = (1.2 if place.startswith("down0") else 0.4) * np.asarray([1, 1, 1, 1, 0])
        control[:, 1, i] = straight(0.5, 0) * np.asarray([1, 1, 1, 1, 0])
    for i, place in enumerate(adapter_places(pipe.config.unet)):
        adapter[:, 0, i] = 0.9 if place == "mid" else straight(0.2, 1)
        adapter[:, 1, i] = 0.3
    expected = written_out(reference, control, adapter, noise_of(pipe, 1.0, 0), (5.0, 3.0), a_mask())
    given = {"guidance_scale": 5.0, "identity_guidance_scale": 3.0, "negative_identity_noise": 1.0, "control_mask": a_mask()}
    given |= {"controlnet_conditioning_scale": "inside: 0.4, down0=1.2; outside: linear(0.5, 0)", "control_guidance_end": 0.8}
    given |= {"ip_adapter_scale": "inside: linear(0.2, 1), mid=0.9; outside: 0.3"}
    assert error(ours(pipe, **given), expected) <= BOUND
    for name in given.keys() - {"control_mask", "guidance_scale"}:
        assert error(ours(pipe, **{k: v for k, v in given.items() if k != name}), expected) > 10 * BOUND, name
