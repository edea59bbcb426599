"""Depth by ONNX models against PyTorch: transformers' own models on random weights, exported, with what the published demo does around them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTConfig, DPTForDepthEstimation

from instantid_jax.face import load_photo
from instantid_jax.onnx_map import OnnxMap

PHOTO = Path(__file__).parents[2] / "instantid_jax/assets/astronaut.jpg"
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}


class Depth(torch.nn.Module):
    """The model's depth alone, which is what is exported."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).predicted_depth


def depth_anything() -> torch.nn.Module:
    backbone = Dinov2Config(**SMALL, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, head_hidden_size=8, **NECK)
    )


def dpt() -> torch.nn.Module:
    return DPTForDepthEstimation(DPTConfig(**SMALL, image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3], **NECK))


@pytest.mark.parametrize(("make", "side", "symmetric"), [(depth_anything, 56, False), (dpt, 64, True)])
def test_exported_depth_models(make: type, side: int, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Depth(make()).eval(), tmp_path / "depth.onnx"
    with torch.no_grad():
        for name, weight in model.named_parameters():  # the initial ones are too small for any depth
            if weight.ndim > 1 and "embeddings" not in name:
                torch.nn.init.kaiming_normal_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of constants that it takes down
        torch.onnx.export(model, (torch.zeros(1, 3, side, side),), str(path), dynamo=False)
    photo = load_photo(PHOTO).crop((100, 0, 356, 192))
    small = np.asarray(photo.resize((side, side), 3), np.float32) / 255  # 3: bicubic, as transformers' image processors have it
    mean, std = ((0.5,) * 3, (0.5,) * 3) if symmetric else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.from_numpy((small - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        depth = model(x)
    made = OnnxMap(path, symmetric=symmetric)
    values = made.predict(photo)
    assert depth.shape == values.shape and values.std() > 1e-3 * np.abs(values).max()
    np.testing.assert_allclose(values, depth.numpy(), rtol=0, atol=1e-4 * float(depth.abs().max()))
    large = torch.nn.functional.interpolate(depth[:, None], size=photo.size[::-1], mode="bicubic", align_corners=False)
    levels = (((large - large.min()) / (large.max() - large.min())) * 255.0).clip(0, 255).numpy().astype(np.uint8)[0, 0]
    differ = np.abs(np.asarray(made(photo))[..., 0].astype(int) - levels)
    assert differ.max() <= 1 and (differ > 0).mean() < 0.01
    print(f"{make.__name__}: {np.abs(values - depth.numpy()).max() / float(depth.abs().max()):.1e}, {(differ > 0).mean():.1e}")
