"""The whole way, from published files through conversion to pictures, against what the official PyTorch pipeline gave."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert_weights.__main__ import main as convert
from instantid_jax.pipeline import InstantIDPipeline

GOLDEN = Path(__file__).parent / "golden" / "dev"
META = json.loads((GOLDEN / "meta.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def pipe(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> InstantIDPipeline:
    out = tmp_path_factory.mktemp("converted")
    base, instantid, extra = golden_snapshot / "base", golden_snapshot / "instantid", golden_snapshot / "controlnet_2"
    assert convert(["import", "--base", str(base), "--instantid", str(instantid), "--out", str(out / "model")]) == 0
    assert convert(["import", "--controlnet", str(extra), "--out", str(out / "extra")]) == 0
    return InstantIDPipeline.from_pretrained(out / "model", controlnets=[out / "extra"])


@pytest.mark.parametrize("case", META["cases"])
def test_official_pipeline_is_reproduced(case: str, pipe: InstantIDPipeline, golden: dict[str, np.ndarray]) -> None:
    settings = dict(META["cases"][case])
    names = settings.pop("image", [META["common"]["image"]])
    settings.pop("controls", None)
    full = settings.pop("pipeline", "base") == "full"
    nets = pipe.controlnets
    pipe.controlnets = nets if len(names) > 1 else ()
    options = {
        "image_embeds": golden["emb"],
        "image": [golden[name] for name in names],
        "latents": golden["latents"].transpose(0, 2, 3, 1),
        "negative_prompt": META["negative_prompt"],
        "prompt_weighting": full,
    }
    try:
        latents = pipe(META["prompt"], **options, **settings, output_type="latent").images
        image = pipe(META["prompt"], **options, **settings, output_type="np").images
    finally:
        pipe.controlnets = nets
    expected = golden[f"{case}/latents"].transpose(0, 2, 3, 1)
    assert np.abs(latents - expected).max() <= 2e-3 * expected.std()
    error = np.square(image - golden[f"{case}/image"]).mean()
    assert -10 * np.log10(error) >= 60
