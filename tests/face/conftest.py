"""Real photos and one shared analyzer. The photos come from installed packages; none is copied into this repository."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from instantid_jax.face import OpenCVAnalyzer, load_photo


def _insightface_picture(name: str) -> Image.Image:
    spec = importlib.util.find_spec("insightface")
    assert spec is not None and spec.submodule_search_locations
    return load_photo(Path(spec.submodule_search_locations[0]) / "data" / "images" / name)


@pytest.fixture(scope="session")
def analyzer() -> OpenCVAnalyzer:
    return OpenCVAnalyzer()


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """One face: the left eye of the picture near (202, 106), the right one near (245, 105)."""
    return data.astronaut()


@pytest.fixture(scope="session")
def six_people() -> Image.Image:
    return _insightface_picture("t1.jpg")


@pytest.fixture(scope="session")
def tight_crop() -> Image.Image:
    """112 x 112 pixels, all face."""
    return _insightface_picture("Tom_Hanks_54745.png")
