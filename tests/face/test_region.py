"""Boxes as masks."""

from typing import Any

import numpy as np
import pytest

from instantid_jax.face import FaceError, box_mask


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((2, 1, 5, 4), (slice(1, 4), slice(2, 5))),
        ((2.9, 1.2, 5.99, 4.5), (slice(1, 4), slice(2, 5))),  # cut to whole pixels
        ((-3.5, -2, 4, 3), (slice(0, 3), slice(0, 4))),  # the published slice [-2:3, -3:4] would be empty
        ((3, 2, 1e20, 1e20), (slice(2, 6), slice(3, 8))),
        ((-9, -9, 99, 99), (slice(0, 6), slice(0, 8))),
    ],
)
def test_a_box_is_white_inside_the_picture(box: tuple[float, ...], inside: tuple[slice, slice]) -> None:
    expected = np.zeros((6, 8), np.uint8)
    expected[inside] = 255
    np.testing.assert_array_equal(box_mask((8, 6), np.float32(box)), expected)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, 3), "four finite numbers"),
        ((1, 2, 3, np.nan), "four finite numbers"),
        ("abcd", "four numbers"),
        ((4, 1, 2, 5), "has no inside"),
        ((-5, 0, -1, 4), "holds no whole pixel of a picture of 8 x 6"),
        ((1.2, 1, 1.7, 4), "holds no whole pixel"),
    ],
)
def test_a_box_without_an_inside_is_refused(box: Any, message: str) -> None:
    with pytest.raises(FaceError, match=f"^mine: .*{message}"):
        box_mask((8, 6), box, "mine")
