"""A model so small that a training step compiles in seconds, records in memory with cached latents, and a run made of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import small


@pytest.fixture(scope="session")
def model():
    return small.model()


@pytest.fixture(scope="session")
def source():
    return small.source(24)


@pytest.fixture
def make_run(tmp_path, source):
    """``make_run(out="name", **fields)``: a run in the test's folder; nested fields as "loss__face_weight"."""
    from instantid_jax.training.loop import Run

    def make(out="run", validation=None, records=None, **fields):
        return Run(small.recipe(tmp_path / out, **fields), source=records or source, validation=validation or source)

    return make
