"""What the pipeline promises its callers, on the small random model."""

import re
from typing import Any

import numpy as np
import pytest

from instantid_jax import denoise as programs
from instantid_jax.defaults import random_pipeline
from instantid_jax.diffusion import SAMPLERS
from instantid_jax.face import draw_kps
from instantid_jax.pipeline import InstantIDPipeline, PipelineError
from instantid_jax.text import TokenizerWarning

KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])
EMBEDDING = np.random.default_rng(0).standard_normal(128).astype(np.float32)
FAST = {"num_inference_steps": 3, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


def make(pipe: InstantIDPipeline, **changes: Any) -> Any:
    arguments = {"prompt": "a person", "image": draw_kps((64, 64), KPS), "image_embeds": EMBEDDING, "output_type": "np"} | FAST | changes
    return pipe(**arguments).images


def as_uint8(images: np.ndarray) -> np.ndarray:
    return np.round(images * 255).astype(np.int16)


def test_a_picture_does_not_depend_on_its_batch(pipe: InstantIDPipeline) -> None:
    together = as_uint8(make(pipe, num_images_per_prompt=4, seed=7, sampler="euler_a"))
    for i in range(4):
        difference = np.abs(as_uint8(make(pipe, seed=7 + i, sampler="euler_a"))[0] - together[i])
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3


def test_other_values_compile_nothing(pipe: InstantIDPipeline, compilations: Any) -> None:
    mask = np.zeros((64, 64), np.float32)
    make(pipe, negative_prompt="x", control_mask=mask)
    with compilations() as compiled:
        make(
            pipe, prompt="two dogs", negative_prompt="blue", seed=99, guidance_scale=3.0, guidance_rescale=0.5, ip_adapter_scale=0.2,
            controlnet_conditioning_scale=0.3, control_guidance_start=0.2, control_guidance_end=0.7, image_embeds=-EMBEDDING,
            image=draw_kps((64, 64), KPS + 5), control_mask=mask + 1, original_size=(10, 20), crops_coords_top_left=(3, 4),
        )  # fmt: skip
    assert compiled == []


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "two dogs"},
        {"negative_prompt": ""},
        {"seed": 1},
        {"guidance_scale": 3.0},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"ip_adapter_scale": 0.0},
        {"controlnet_conditioning_scale": 0.0},
        {"control_guidance_end": 0.5},
        {"image_embeds": -EMBEDDING},
        {"image": draw_kps((64, 64), KPS + 5)},
        {"control_mask": np.zeros((64, 64), np.float32)},
        {"original_size": (512, 512)},
        {"crops_coords_top_left": (30, 30)},
        {"target_size": (512, 512)},
        {"negative_original_size": (512, 512), "negative_target_size": (64, 64)},
        {"clip_skip": 1},
        {"prompt_weighting": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_setting_reaches_the_picture(pipe: InstantIDPipeline, change: dict[str, Any]) -> None:
    assert np.abs(make(pipe, output_type="latent") - make(pipe, output_type="latent", **change)).max() > 1e-4


def test_shortcuts_reach_the_picture_and_another_pace_compiles_nothing(pipe: InstantIDPipeline, compilations: Any) -> None:
    fast = {"cache_interval": 2, "control_interval": 2, "guidance_end": 0.7, "output_type": "latent"}
    first = make(pipe, **fast)
    with compilations() as compiled:
        others = [make(pipe, **fast | change) for change in ({"cache_interval": 3}, {"control_interval": 3}, {"guidance_start": 0.3})]
    assert compiled == []
    pictures = [first, *others, make(pipe, output_type="latent")]
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(pictures) for b in pictures[:i])


def test_tiles_are_near_to_the_whole_picture(pipe: InstantIDPipeline) -> None:
    whole = make(pipe)
    tiled = make(pipe, vae_tiling="even", vae_tile_size=32)
    np.testing.assert_array_equal(make(pipe, vae_tiling="even"), whole)
    assert tiled.shape == whole.shape and 0 < np.abs(tiled - whole).mean() < 0.1


@pytest.mark.slow
def test_the_last_noise_level_reaches_the_picture(pipe: InstantIDPipeline) -> None:
    old = make(pipe, sampler="unipc", sampler_options={"final_sigmas_type": "sigma_min"}, output_type="latent")
    assert np.abs(make(pipe, sampler="unipc", output_type="latent") - old).max() > 1e-4


QUICK = ("dpmpp_2m",)  # the arithmetic of all is held against diffusers without a pipeline, of some in one (`tests/parity`)


@pytest.mark.parametrize("sampler", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS])
def test_every_sampler_runs_and_repeats(pipe: InstantIDPipeline, sampler: str) -> None:
    first, second = (make(pipe, sampler=sampler, output_type="latent", on_step=listener) for listener in (None, lambda _: None))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


def test_a_mask_of_ones_is_no_mask(pipe: InstantIDPipeline) -> None:
    plain, masked = make(pipe, output_type="latent"), make(pipe, output_type="latent", control_mask=np.ones((64, 64), np.float32))
    np.testing.assert_allclose(masked, plain, atol=1e-5)


def test_a_box_is_a_mask_that_is_white_inside(pipe: InstantIDPipeline) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[5:40, :33] = 255
    boxed = make(pipe, output_type="latent", control_mask=(-9, 5.5, 33.2, 40))
    np.testing.assert_array_equal(boxed, make(pipe, output_type="latent", control_mask=mask))


def test_without_identity_strengths_the_identity_does_not_matter(pipe: InstantIDPipeline) -> None:
    off = {"ip_adapter_scale": 0.0, "controlnet_conditioning_scale": 0.0, "output_type": "latent"}
    np.testing.assert_array_equal(make(pipe, **off), make(pipe, image_embeds=-EMBEDDING, image=draw_kps((64, 64), KPS + 9), **off))


def test_a_closed_window_is_no_control(pipe: InstantIDPipeline) -> None:
    closed = make(pipe, control_guidance_start=0.98, control_guidance_end=0.99, output_type="latent")
    np.testing.assert_array_equal(closed, make(pipe, controlnet_conditioning_scale=0.0, output_type="latent"))


def test_several_photos_are_averaged(pipe: InstantIDPipeline) -> None:
    photos = np.stack([EMBEDDING, 3 * EMBEDDING])
    np.testing.assert_array_equal(make(pipe, image_embeds=photos), make(pipe, image_embeds=2 * EMBEDDING))


def test_text_beyond_the_window_reaches_the_picture_with_weighting(pipe: InstantIDPipeline) -> None:
    long = "a person " * 60
    options = {"prompt_weighting": True, "output_type": "latent"}
    assert np.abs(make(pipe, prompt=long + "in green", **options) - make(pipe, prompt=long + "in blue", **options)).max() > 1e-5


def test_words_beyond_the_window_are_named(pipe: InstantIDPipeline) -> None:
    with pytest.warns(TokenizerWarning, match=r"more than 77 tokens; left out: 'and a red hat'"):
        make(pipe, prompt="a " * 75 + "and a red hat")


SHORTCUTS = {"cache_interval": 2, "cache_branch_id": 1, "control_interval": 2, "guidance_end": 0.5}


@pytest.mark.parametrize("changes", [{}, pytest.param(SHORTCUTS, marks=pytest.mark.slow)])
def test_a_watched_run_gives_the_same_picture(pipe: InstantIDPipeline, changes: dict[str, Any], compilations: Any) -> None:
    changes = changes | {"sampler": "euler_a", "output_type": "latent"}
    seen: list[int] = []
    watched = make(pipe, on_step=seen.append, **changes)
    assert seen == [0, 1, 2]
    np.testing.assert_array_equal(watched, make(pipe, **changes))
    with compilations() as compiled:
        make(pipe, on_step=seen.append, seed=1, **changes)
    assert compiled == []


@pytest.mark.slow
def test_a_watched_edit_makes_its_own_calls_alone(pipe: InstantIDPipeline) -> None:
    changes = {"init_image": draw_kps((64, 64), KPS), "mask_image": np.eye(64), "strength": 0.7, "output_type": "latent"}
    seen: list[int] = []
    watched = make(pipe, on_step=seen.append, **changes)
    assert seen == [0, 1]
    np.testing.assert_array_equal(watched, make(pipe, **changes))


def test_given_latents_replace_the_seed(pipe: InstantIDPipeline) -> None:
    noise = np.asarray(programs.initial_noise(np.asarray([5], np.uint32), (8, 8, 4)))
    np.testing.assert_array_equal(make(pipe, seed=5), make(pipe, seed=0, latents=noise))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"height": 100}, "height must be a multiple of 8, not 100"),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, not 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"controlnet_conditioning_scale": [0.8, 0.5]}, "2 values for 1 nets"),
        ({"image": [KPS, KPS]}, "2 pictures for 1 nets"),
        ({"image": KPS}, "image must be a picture"),
        ({"image_embeds": np.zeros(512, np.float32)}, "vectors of 128"),
        ({"image_embeds": np.zeros(128, np.float32)}, "zero vector"),
        ({"image_embeds": np.full(128, np.nan, np.float32)}, "not finite"),
        ({"latents": np.zeros((1, 4, 8, 8))}, re.escape("needs (1, 8, 8, 4)")),
        ({"control_mask": np.zeros((32, 64))}, re.escape("control_mask has shape (32, 64)")),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.1}, "must be smaller than"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_start 0.5 must be smaller than guidance_end 0.5"),
        ({"guidance_end": 2}, "guidance_end must be between 0 and 1, not 2"),
        ({"cache_interval": 0}, "cache_interval must be between 1 and 1000, not 0"),
        ({"cache_branch_id": 9}, "cache_branch_id must be between 0 and 8, not 9"),
        ({"control_interval": 1.5}, "control_interval must be a whole number, not 1.5"),
        ({"vae_tiling": True}, "vae_tiling must be 'even', 'diffusers' or None, not True"),
        ({"vae_tile_size": 64}, "no meaning without vae_tiling"),
        ({"vae_tiling": "even", "vae_tile_size": 72}, "vae_tile_size must be a multiple of 32, not 72"),
        ({"output_type": "jpg"}, "output_type must be one of"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 texts, prompt has 1"),
        ({"seed": -1}, "seed must be between"),
        ({"seed": 2**32}, "seed must be between 0 and 4294967295, not 4294967296"),
        ({"prompt_weighting": True, "clip_skip": 1}, "no meaning with prompt_weighting"),
        ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents has values that are not finite"),
        ({"image_embeds": "x"}, "image_embeds must be an array of real numbers"),
        ({"image_embeds": EMBEDDING + 1j}, "image_embeds must be an array of real numbers, not complex64"),
        ({"image_embeds": [[1.0], [1.0, 2.0]]}, "image_embeds must be an array of real numbers"),
        ({"sampler_options": 3}, "sampler_options must be a dict"),
        ({"sampler": "ddim", "sampler_options": {"eta": "x"}}, "'eta' of sampler 'ddim' must be a number from 0 to 1"),
        ({"sampler_options": {"karras": 3}}, "must be True or False, not 3"),
        ({"sampler": ["euler"]}, "sampler must be a name"),
        ({"sampler": "lcm", "num_inference_steps": 60}, "use fewer steps"),
        ({"control_mask": np.zeros((64, 64, 4), np.float32)}, "with 1 or 3 channels"),
        ({"control_mask": (70, 0, 80, 10)}, re.escape("control_mask: the box [70.0, 0.0, 80.0, 10.0] holds no whole pixel of a picture of 64 x 64")),
        ({"control_mask": "x"}, "control_mask must be an array of real numbers"),
        ({"clip_skip": 2}, "clip_skip must be between 0 and 1, not 2"),
        ({"image": np.full((64, 64, 3), 1.5)}, r"image must be uint8, or float in \[0, 1\]"),
    ],
)
def test_bad_arguments_get_one_clear_sentence(pipe: InstantIDPipeline, change: dict[str, Any], message: str, compilations: Any) -> None:
    with compilations() as compiled, pytest.raises(PipelineError, match=message):
        make(pipe, **change)
    assert compiled == []


def test_no_clip_skip_is_none(pipe: InstantIDPipeline) -> None:
    np.testing.assert_array_equal(make(pipe, clip_skip=None, output_type="latent"), make(pipe, output_type="latent"))
