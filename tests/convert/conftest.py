"""The golden case, converted once and exported once for all tests here."""

from pathlib import Path

import pytest

from convert_weights.__main__ import main


@pytest.fixture(scope="session")
def converted(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole golden snapshot as ``import`` writes it, tensors as they are."""
    out = tmp_path_factory.mktemp("converted") / "weights"
    assert main(["import", "--base", str(golden_snapshot / "base"), "--instantid", str(golden_snapshot / "instantid"), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def exported(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`converted` as ``export --base`` writes it."""
    out = tmp_path_factory.mktemp("exported") / "published"
    assert main(["export", "--weights", str(converted), "--out", str(out), "--base"]) == 0
    return out


@pytest.fixture(scope="session")
def converted_controlnet(golden_snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case's second ControlNet as ``import --controlnet`` writes it."""
    out = tmp_path_factory.mktemp("controlnet") / "weights"
    assert main(["import", "--controlnet", str(golden_snapshot / "controlnet_2"), "--out", str(out)]) == 0
    return out
