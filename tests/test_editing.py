"""Image to image and inpainting: the mask, the steps that are made, and what the pipeline promises of them, on the small random model."""

from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter

from instantid_jax import Person
from instantid_jax.config import tiny
from instantid_jax.defaults import random_pipeline
from instantid_jax.editing import Placed, canvas, check_initial
from instantid_jax.face import draw_kps
from instantid_jax.pipeline import InstantIDPipeline, PipelineError, check_call

KPS = np.float32([[24, 24], [40, 24], [32, 34], [26, 44], [38, 44]])
EMBEDDING = np.random.default_rng(0).standard_normal(128).astype(np.float32)
PICTURE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[11:40, 19:50] = 255


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


def make(pipe: InstantIDPipeline, **changes: Any) -> Any:
    fixed = {"prompt": "a person", "image": draw_kps((64, 64), KPS), "image_embeds": EMBEDDING, "num_inference_steps": 4}
    return pipe(**fixed | {"output_type": "np", "init_image": PICTURE} | changes).images


def placed(**call: Any) -> Placed:
    initial = check_initial(PICTURE, None, **call)
    assert initial is not None
    return initial.placed(check_call(tiny(), prompt="x"), (64, 64))


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(30, 0.85, 25), (50, 0.8, 40), (10, 0.3, 3), (10, 0.99, 9), (4, 1.0, 4), (3, 0.34, 1), (7, None, 7)]
)
def test_the_official_number_of_steps(steps: int, strength: float | None, made: int) -> None:
    request = check_call(tiny(), prompt="x", num_inference_steps=steps, strength=strength)
    assert request.plan.num_calls == made and request.start == steps - made and request.whole.num_calls == steps


def test_other_strengths_pictures_masks_and_blurs_compile_nothing(pipe: InstantIDPipeline, compilations: Any) -> None:
    make(pipe, mask_image=MASK)
    with compilations() as compiled:
        others = [
            make(pipe, mask_image=255 - MASK, **change)
            for change in ({"strength": 0.3}, {"strength": 1.0}, {"mask_blur": 3}, {"init_image": 255 - PICTURE}, {"seed": 5})
        ]
    assert compiled == []
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(others) for b in others[:i])


def test_outside_the_mask_every_pixel_stays(pipe: InstantIDPipeline) -> None:
    kept = make(pipe, mask_image=MASK, output_type="pil")[0]
    different = (np.asarray(kept) != PICTURE).any(axis=-1)
    assert not different[MASK == 0].any() and different[MASK > 0].mean() > 0.9
    loose = np.round(make(pipe, mask_image=MASK, keep_unmasked=False)[0] * 255)
    assert (loose != PICTURE).any(axis=-1)[MASK == 0].mean() > 0.9


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch(pipe: InstantIDPipeline) -> None:
    options = {"mask_image": MASK, "sampler": "euler_a", "strength": 0.5}
    together = make(pipe, num_images_per_prompt=2, seed=7, **options)
    for i in range(2):
        difference = np.abs(np.round(make(pipe, seed=7 + i, **options)[0] * 255) - np.round(together[i] * 255))
        assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_every_setting_reaches_the_picture(pipe: InstantIDPipeline) -> None:
    base = make(pipe, output_type="latent")
    for change in ({"ip_adapter_scale": 1.3}, {"controlnet_conditioning_scale": 0.0}, {"image_embeds": -EMBEDDING}, {"sample_mode": "argmax"}):
        assert np.abs(make(pipe, output_type="latent", **change) - base).max() > 1e-5, change


@pytest.mark.parametrize("sampler", ["dpmpp_2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("heun", "ddim", "unipc", "lcm", "tcd"))])
def test_without_a_mask_a_small_strength_stays_near(pipe: InstantIDPipeline, sampler: str) -> None:
    near, far = (make(pipe, sampler=sampler, strength=strength, output_type="latent", num_inference_steps=8) for strength in (0.2, 1.0))
    assert np.isfinite(near).all() and np.isfinite(far).all() and np.abs(near - far).max() > 1e-2


@pytest.mark.slow
def test_several_people_in_a_picture_that_is_changed(pipe: InstantIDPipeline) -> None:
    people = [Person(EMBEDDING, draw_kps((64, 64), KPS - 9), (0, 0, 32, 64)), Person(-EMBEDDING, draw_kps((64, 64), KPS + 9), (32, 0, 64, 64))]
    options = {"image": None, "image_embeds": None, "max_people": 2, "mask_image": MASK}
    both, one = (make(pipe, people=people[:n], **options) for n in (2, 1))
    assert np.array_equal(both[0][MASK == 0], one[0][MASK == 0]) and np.abs(both - one).max() > 1e-3


@pytest.mark.slow
def test_shortcuts_go_with_it(pipe: InstantIDPipeline) -> None:
    fast = {"cache_interval": 2, "control_interval": 2, "guidance_end": 0.7, "output_type": "latent", "strength": 0.75}
    assert np.isfinite(make(pipe, **fast)).all()


def test_the_blur_is_diffusers() -> None:
    soft = placed(mask_image=MASK, mask_blur=4).mask
    assert soft is not None
    expected = VaeImageProcessor.blur(Image.fromarray(MASK), 4)
    np.testing.assert_array_equal(np.round(soft * 255), np.asarray(expected))


def test_the_paste_is_diffusers_overlay() -> None:
    made = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    ours = np.round(placed(mask_image=MASK, mask_blur=3).finished(made[None] / np.float32(255))[0] * 255)
    mask = Image.fromarray(MASK).filter(ImageFilter.GaussianBlur(3))
    overlay = VaeImageProcessor().apply_overlay(mask, Image.fromarray(PICTURE), Image.fromarray(made))
    assert np.abs(ours - np.asarray(overlay, np.float32)).max() <= 2  # of 8-bit roundings there


def test_a_mask_of_another_size_is_resized() -> None:
    large = Image.fromarray(MASK).resize((256, 256), Image.Resampling.NEAREST)
    for given in (large, large.convert("RGB"), np.asarray(large), np.asarray(large, np.float32) / 255):
        mask = placed(mask_image=given).mask
        assert mask is not None and np.array_equal(mask >= 0.5, MASK > 0)
    boxed = placed(mask_image=(19, 11, 50, 40)).mask
    np.testing.assert_array_equal(boxed, MASK / np.float32(255))


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((1000, 803), (None, None, 1280, None), (1000, 800)),
        ((3000, 2000), (None, None, 1280, None), (1280, 832)),
        ((3000, 2000), (600, None, 1280, None), (600, 400)),
        ((3000, 2000), (512, 768, 1280, None), (512, 768)),
        ((256, 128), (None, None, 1280, 64), (128, 64)),
        ((40, 50), (None, None, 1280, None), (64, 64)),
    ],
)
def test_the_output_has_the_pictures_size(size: tuple[int, int], given: Any, expected: tuple[int, int]) -> None:
    assert canvas(size, *given) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.1}, "strength must be at least 0.25 with 4 steps, so that one of them is made, not 0.1"),
        ({"strength": 1.2}, "strength must be between 0 and 1, not 1.2"),
        ({"init_image": None, "strength": 0.5}, "strength must go with init_image"),
        ({"init_image": None, "mask_image": MASK}, "mask_image must go with init_image"),
        ({"mask_blur": 3}, "mask_blur must go with mask_image"),
        ({"mask_blur": -1, "mask_image": MASK}, "mask_blur must be between 0 and 1024, not -1"),
        ({"mask_image": np.zeros((64, 64), np.uint8)}, "mask_image marks none of the latent's pixels, one in 8 x 8"),
        ({"mask_image": np.full((64, 64), 2.0)}, "mask_image must hold whole numbers from 0 to 255"),
        ({"mask_image": "x"}, "mask_image must be an array of real numbers"),
        ({"init_image": KPS}, "init_image must be a picture"),
        ({"keep_unmasked": 1}, "keep_unmasked must be True or False, not 1"),
        ({"sample_mode": "mean"}, "sample_mode must be 'sample' or 'argmax', not 'mean'"),
        ({"control_image": KPS}, "the picture to begin with is init_image"),
    ],
)
def test_bad_arguments_get_one_clear_sentence(pipe: InstantIDPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        make(pipe, **change)
