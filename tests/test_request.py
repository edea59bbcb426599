"""Arguments of a call by themselves: messages in a command line's words, and sizes as diffusers understands them."""

from typing import Any

import numpy as np
import pytest

from instantid_jax.config import tiny
from instantid_jax.pipeline import check_call
from instantid_jax.request import PipelineError, in_options, read_sampler_options
from instantid_jax.strengths import read_strength


def test_a_call_is_checked_without_a_model() -> None:
    request = check_call(tiny(), prompt="x", num_inference_steps=7, sampler="heun")
    assert request.plan.num_calls == 13 and request.guided and request.clip_skip == 0
    with pytest.raises(PipelineError, match="2 values for 1 nets"):
        check_call(tiny(), prompt="x", controlnet_conditioning_scale=[1.0, 1.0])
    assert check_call(tiny(), nets=2, prompt="x", controlnet_conditioning_scale=[1.0, 0.5]).scales == [read_strength(1.0), read_strength(0.5)]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("num_inference_steps must be between 1 and 1000, not 0", "--steps must be between 1 and 1000, not 0"),
        ("seed must be between 0 and 4294967295, not -1", "--seed must be between 0 and 4294967295, not -1"),
        ("the prompt has more than 77 tokens, seed must", "the prompt has more than 77 tokens, seed must"),
        ("guidance_scale.png: there is no such file", "guidance_scale.png: there is no such file"),
        ("photos/guidance_scale: there is no such file", "photos/guidance_scale: there is no such file"),
        ("p.csv, line 2: column ip_adapter_scale must be a number", "p.csv, line 2: column ip_adapter_scale must be a number"),
    ],
)
def test_messages_in_the_words_of_the_command_line(message: str, expected: str) -> None:
    assert in_options(message) == expected


def test_sampler_options_of_the_command_line() -> None:
    given = ["karras=true", "eta=0.5", "original_inference_steps=40", "final_sigmas_type=sigma_min"]
    assert read_sampler_options(given) == {"karras": True, "eta": 0.5, "original_inference_steps": 40, "final_sigmas_type": "sigma_min"}
    with pytest.raises(PipelineError, match="must be written as key=value, not 'karras'"):
        read_sampler_options(["karras"])


def sizes(**arguments: Any) -> list[list[float]]:
    return check_call(tiny(), prompt="x", **arguments).time_ids((64, 96)).tolist()


def test_float_pictures_are_not_rounded() -> None:
    fine = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    np.testing.assert_array_equal(check_call(tiny(), prompt="x").control_images(fine, 8)[0], fine)


def test_negative_sizes_count_only_together() -> None:
    positive = [64, 96, 0, 0, 64, 96]
    assert sizes() == [positive, positive]
    assert sizes(guidance_scale=1.0) == [positive]
    assert sizes(negative_original_size=(5, 6)) == [positive, positive]
    assert sizes(negative_crops_coords_top_left=(5, 6)) == [positive, positive]
    assert sizes(negative_original_size=(5, 6), negative_target_size=(7, 8), crops_coords_top_left=(3, 4)) == [
        [5, 6, 0, 0, 7, 8],
        [64, 96, 3, 4, 64, 96],
    ]
