"""Image to image and inpainting against diffusers' own SDXL ControlNet pipelines, with the identity put into their networks.

The nets are the golden case's in diffusers' classes. diffusers' pipelines run as they are; IdentityNet is handed the identity tokens
in the place of the text, and the UNet gets them behind the text, as InstantID's pipelines do. All random numbers are this package's.
"""

import functools
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders import vae as torch_vae
from diffusers.pipelines.controlnet import pipeline_controlnet_inpaint_sd_xl as inpainting
from diffusers.pipelines.controlnet import pipeline_controlnet_sd_xl_img2img as img2img
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from oracle import error, nhwc
from PIL import Image
from test_whole_pipeline import GUIDANCE, NEGATIVE, PROMPT, STRENGTHS, Reference, resampler

from convert_weights.__main__ import main as convert
from instantid_jax import denoise as programs
from instantid_jax.pipeline import InstantIDPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers give tensors to numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BOUND = 1e-4
SIDE, SEED, STEPS = 64, 11, 5
RANDOM = (torch_vae, inpainting, img2img, scheduling_euler_ancestral_discrete, scheduling_lcm)
SCHEDULERS: dict[str, Any] = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


@pytest.fixture(scope="module")
def reference(golden_snapshot: Path) -> Reference:
    return Reference(golden_snapshot)


@pytest.fixture(scope="module")
def converted(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edited")
    model = ["--base", str(golden_snapshot / "base"), "--instantid", str(golden_snapshot / "instantid")]
    assert convert(["import", *model, "--out", str(out / "model")]) == 0
    assert convert(["import", "--controlnet", str(golden_snapshot / "controlnet_2"), "--out", str(out / "extra")]) == 0
    return out


def a_picture() -> Image.Image:
    """Smooth, coloured and nowhere symmetric."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    waves = [np.sin(5 * x + 3 * y), np.cos(7 * y * x + 1), np.sin(4 * y - 6 * x)]
    return Image.fromarray(np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


def a_mask() -> Image.Image:
    y, x = np.mgrid[:SIDE, :SIDE]
    return Image.fromarray((np.hypot(y - 26, 1.4 * (x - 38)) < 24).astype(np.uint8) * 255)


def draws(calls: int, masked: bool) -> list[torch.Tensor]:
    """The random numbers of this package in the order in which diffusers asks for them."""
    seeds, shape = np.asarray([SEED], np.uint32), (SIDE // 8, SIDE // 8, 4)
    keys = programs.picture_keys(jnp.asarray(seeds))
    found = [programs.encoding_noise(seeds, shape), programs.initial_noise(seeds, shape)]
    found += [jnp.zeros((1, *shape))] if masked else []  # of a masked picture, which only 9-channel UNets see
    found += [programs._normal(keys, i + 1, shape) for i in range(calls)]
    return [torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)) for x in found]


def theirs(
    reference: Reference, base: Path, nets: int, sampler: str, embedding: np.ndarray, images: list[np.ndarray], monkeypatch: Any, **call: Any
) -> np.ndarray:
    masked = "mask_image" in call
    scheduler = SCHEDULERS[sampler].from_config(reference.scheduler.config)
    cls = inpainting.StableDiffusionXLControlNetInpaintPipeline if masked else img2img.StableDiffusionXLControlNetImg2ImgPipeline
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    chosen = reference.nets[0] if nets == 1 else reference.nets[:nets]
    networks = {"vae": AutoencoderKL.from_pretrained(base / "vae").eval(), "unet": reference.unet, "controlnet": chosen, "scheduler": scheduler}
    pipe = cls(**nothing, **networks, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for site in reference.sites:
        site.region = None
    vector = torch.from_numpy(embedding)
    identity = resampler(reference.image_proj, torch.stack([torch.zeros_like(vector), vector]))
    net, unet = reference.nets[0].forward, reference.unet.forward

    def with_identity(*args: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return net(*args, encoder_hidden_states=identity, **kwargs)

    def with_both(*args: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return unet(*args, encoder_hidden_states=torch.cat([encoder_hidden_states, identity], dim=1), **kwargs)

    monkeypatch.setattr(reference.nets[0], "forward", with_identity)
    monkeypatch.setattr(reference.unet, "forward", with_both)
    given = iter(draws(2 * STEPS, masked))
    for module in RANDOM:
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(given))
    text, pooled = reference.text()
    negative, positive = text.chunk(2)
    negative_pooled, positive_pooled = pooled.chunk(2)
    pictures = [Image.fromarray(image) for image in images[:nets]]
    out = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=positive_pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        image=a_picture(),
        control_image=pictures[0] if nets == 1 else pictures,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=STRENGTHS[0] if nets == 1 else list(STRENGTHS),
        output_type="latent",
        **call,
    ).images
    return nhwc(out)


@functools.cache
def loaded(folder: Path, nets: int) -> InstantIDPipeline:
    return InstantIDPipeline.from_pretrained(folder / "model", controlnets=[folder / "extra"] if nets == 2 else [])


@pytest.mark.parametrize(
    ("sampler", "nets", "call"),
    [
        ("euler", 1, {"strength": 0.85}),
        ("euler", 1, {"strength": 1.0}),
        ("euler", 1, {"strength": 0.5, "control_guidance_start": 0.4, "control_guidance_end": 0.9}),
        ("euler", 1, {"strength": 0.7, "mask_image": a_mask()}),
        ("euler", 1, {"strength": 1.0, "mask_image": a_mask()}),
        ("heun", 1, {"strength": 0.7, "mask_image": a_mask()}),
        ("unipc", 1, {"strength": 0.7, "mask_image": a_mask()}),
        ("euler_a", 1, {"strength": 0.7, "mask_image": a_mask()}),
        ("lcm", 1, {"strength": 0.7}),
        ("euler", 2, {"strength": 0.7, "mask_image": a_mask()}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_latents_are_those_of_diffusers(
    sampler: str, nets: int, call: dict[str, Any], converted: Path, reference: Reference, golden_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with np.load(Path(__file__).parents[1] / "golden/dev/golden.npz") as golden:
        images, embedding = [golden["kps_image"], golden["control_image"]], golden["emb"].astype(np.float32)
    ours = loaded(converted, nets)(
        PROMPT,
        images[:nets],
        embedding,
        negative_prompt=NEGATIVE,
        init_image=a_picture(),
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=list(STRENGTHS[:nets]),
        ip_adapter_scale=0.8,
        sampler=sampler,
        seed=SEED,
        output_type="latent",
        **call,
    ).images
    expected = theirs(reference, golden_snapshot / "base", nets, sampler, embedding, images, monkeypatch, **call)
    assert error(ours, expected) <= BOUND
    # What this is about makes a difference far above the bound.
    other = dict(call) | {"strength": 0.3 if call["strength"] < 1 else 0.8}
    monkeypatch.undo()
    assert error(theirs(reference, golden_snapshot / "base", nets, sampler, embedding, images, monkeypatch, **other), expected) > 100 * BOUND
