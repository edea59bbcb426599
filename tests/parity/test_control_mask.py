"""The mask on IdentityNet's residuals, against torch's bilinear resizing (which is what the published full pipeline calls)."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from instantid_jax.denoise import control_masks


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (1024, 768), (120, 72)])
def test_masks_at_every_resolution(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random((1, *size), dtype=np.float32)
    levels = [(-(-size[0] // n), -(-size[1] // n)) for n in (8, 16, 32)]
    masks = control_masks(jnp.asarray(mask), levels[0], len(levels))
    assert list(masks) == levels
    for level, ours in masks.items():
        reference = torch.nn.functional.interpolate(torch.from_numpy(mask)[None], size=level, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(np.asarray(ours)[0, :, :, 0], reference[0, 0].numpy(), atol=1e-6)
