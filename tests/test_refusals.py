"""What a call does not take, and what goes wrong while it runs: one clear sentence, with what to use instead."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from instantid_jax.config import ModelConfig, tiny
from instantid_jax.defaults import random_pipeline
from instantid_jax.foreign import CALL, LOADING, METHODS
from instantid_jax.pipeline import InstantIDPipeline, PipelineError, check_call


@pytest.fixture(scope="module")
def pipe() -> InstantIDPipeline:
    return random_pipeline()


def make(pipe: InstantIDPipeline, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "image_embeds": np.ones(128, np.float32)} | changes
    return pipe("a person", image=Image.new("RGB", (64, 64)), **arguments).images


@pytest.mark.parametrize("name", CALL)
def test_arguments_of_diffusers_are_refused_with_what_to_use(name: str, pipe: InstantIDPipeline) -> None:
    with pytest.raises(PipelineError) as caught:
        make(pipe, **{name: None})
    assert str(caught.value) == f"{name} is an argument of diffusers that the pipeline does not take: {CALL[name]}"


def test_the_names_that_are_offered_instead_exist() -> None:
    assert CALL["generator"].startswith("give seed ") and "latents" in CALL["generator"]
    taken = check_call.__globals__["inspect"].signature(InstantIDPipeline.__call__).parameters
    assert not CALL.keys() & taken.keys()
    for text in CALL.values():
        assert set(re.findall(r"\b(?:seed|latents|\w+_(?:scale|step|embeds|steps|options|prompt))\b", text)) <= set(taken), text


def test_a_misspelled_argument_gets_its_name(pipe: InstantIDPipeline) -> None:
    with pytest.raises(PipelineError, match=r"^the pipeline has no argument 'guidance_scal'; did you mean 'guidance_scale'\?$"):
        make(pipe, guidance_scal=5)


@pytest.mark.parametrize("name", LOADING)
def test_loading_refuses_them_too(name: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is an argument of diffusers that from_pretrained does not take: ") as caught:
        InstantIDPipeline.from_pretrained(tmp_path, **{name: None})
    assert str(caught.value).startswith(f"{name} is ") and str(caught.value).endswith(LOADING[name])


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_diffusers_are_named(name: str, pipe: InstantIDPipeline) -> None:
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError) as caught:
        getattr(pipe, name)
    assert str(caught.value) == f"InstantIDPipeline has no {name!r}; in its place: {METHODS[name]}"


@pytest.mark.parametrize("name", ["original_size", "target_size", "negative_original_size", "negative_target_size"])
@pytest.mark.parametrize("value", [(0, 0), (-1, -1), (64, 0)])
def test_sizes_are_positive(name: str, value: tuple[int, int]) -> None:
    with pytest.raises(PipelineError, match=rf"^{name} must be between 1 and 65536, not {min(value)}$"):
        check_call(tiny(), prompt="x", **{name: value})


def test_crops_are_not_negative() -> None:
    assert check_call(tiny(), prompt="x", crops_coords_top_left=(0, 5)).sizes[1] == (0, 5)
    with pytest.raises(PipelineError, match="crops_coords_top_left must be between 0 and 65536, not -1"):
        check_call(tiny(), prompt="x", crops_coords_top_left=(0, -1))


def test_a_second_negative_prompt_is_never_dropped_silently() -> None:
    """diffusers takes zeros for both towers where the first is None and the model says so, whatever the second is."""
    zeros, empty = tiny(), ModelConfig(**{**vars(tiny()), "force_zeros_for_empty_prompt": False})
    with pytest.raises(PipelineError, match="negative_prompt_2 counts only together with negative_prompt"):
        check_call(zeros, prompt="x", negative_prompt_2="y")
    assert check_call(zeros, prompt="x", negative_prompt="", negative_prompt_2="y").negative_prompts_2 == ["y"]
    assert check_call(empty, prompt="x", negative_prompt_2="y").negative_prompts_2 == ["y"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_a_mask_of_whole_numbers_goes_to_255(dtype: Any) -> None:
    levels = np.arange(64 * 64).reshape(64, 64) % 256
    mask = check_call(tiny(), prompt="x").mask(levels.astype(dtype), (64, 64))
    np.testing.assert_array_equal(mask, levels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("value", [np.full((64, 64), 256), np.full((64, 64), -1), np.full((64, 64), 1.5, np.float32)])
def test_a_mask_out_of_range_is_refused(value: np.ndarray) -> None:
    with pytest.raises(PipelineError, match=rf"from 0\.0 to 1\.0, not {value[0, 0]} to {value[0, 0]}$"):
        check_call(tiny(), prompt="x").mask(value, (64, 64))


def test_a_mask_of_true_and_ones() -> None:
    request = check_call(tiny(), prompt="x")
    for dtype in (bool, np.int64, np.float32):
        np.testing.assert_array_equal(request.mask(np.ones((64, 64), dtype), (64, 64)), np.ones((64, 64), np.float32))


@pytest.mark.parametrize("output_type", ["latent", "np", "pil"])
def test_values_that_are_not_finite_are_the_denoisers(output_type: str, pipe: InstantIDPipeline) -> None:
    healthy = pipe.parameters
    pipe.parameters = healthy | {"unet": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), healthy["unet"])}
    try:
        with pytest.raises(PipelineError, match=r"^the denoising networks gave values that are not finite"):
            make(pipe, output_type=output_type)
        pipe.parameters = healthy | {"vae": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), healthy["vae"])}
        if output_type != "latent":
            with pytest.raises(PipelineError, match=r"^the autoencoder gave values that are not finite"):
                make(pipe, output_type=output_type)
    finally:
        pipe.parameters = healthy


def test_a_listener_must_be_callable(pipe: InstantIDPipeline) -> None:
    with pytest.raises(PipelineError, match=r"^on_step must be a function of the number of the finished model call, not 3$"):
        make(pipe, on_step=3)


def test_what_a_listener_raises_reaches_the_caller(pipe: InstantIDPipeline) -> None:
    calls: list[int] = []

    def broken(index: int) -> None:
        calls.append(index)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make(pipe, on_step=broken)
    assert calls == [0]
