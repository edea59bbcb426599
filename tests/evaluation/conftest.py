"""Small stand-ins: a judge that looks at colours, and few people with few renders to fit on."""

import numpy as np
import pytest

from instantid_jax.defaults import random_pipeline
from instantid_jax.evaluation import panel as panels
from instantid_jax.evaluation.attributes import TextJudge
from instantid_jax.evaluation.panel import Panel, fit_text_judge, make_panel
from instantid_jax.evaluation.store import Store
from instantid_jax.face import FaceAnalyzer, load_analyzer
from instantid_jax.pipeline import InstantIDPipeline

PEOPLE = 5


class ColorJudge:
    """The colours around the five keypoints as an embedding: enough to tell rendered people apart."""

    name = "colours"

    def embed(self, image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        side, scale = image.shape[0], np.linalg.norm(keypoints[1] - keypoints[0])
        places = np.concatenate([keypoints, (keypoints[[0, 1]] + keypoints[2]) / 2, keypoints[[2]] - (0, scale)])
        columns, rows = np.clip(places.astype(int), 0, side - 1).T
        vector = image[rows, columns].astype(np.float64).ravel() - 110
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture(scope="session")
def pipe() -> InstantIDPipeline:
    """The small random model."""
    return random_pipeline()


@pytest.fixture(scope="session")
def analyzer() -> FaceAnalyzer:
    return load_analyzer("opencv")


@pytest.fixture(scope="session")
def world():
    pytest.importorskip("numba")
    from instantid_jax.data.portraits import PortraitWorld

    return PortraitWorld(image_size=64, supersample=2)


@pytest.fixture(scope="session")
def panel(world, analyzer) -> Panel:
    return make_panel(world, PEOPLE, analyzer)


@pytest.fixture(scope="session")
def few_fitting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "_FIT_PHOTOS", 120)
        patch.setattr(panels, "_FIT_OTHERS", 15)
        yield


@pytest.fixture(scope="session")
def text_judge(world, few_fitting) -> TextJudge:
    return fit_text_judge(world, Store(None))
