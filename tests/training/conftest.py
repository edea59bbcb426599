"""A model so small that all of a run fits a moment, records in memory with cached latents, and runs made of them.

Most of the trainer is one whatever is learned, so most tests train the recogniser of latents (`quick`), whose step compiles
in a second; those of the denoising objective share one compiled program.
"""

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import small

from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.training.loop import Run
from instantid_jax.training.program import Program


@pytest.fixture(scope="session")
def source():
    return small.source(24)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Starting weights of what `quick` runs need."""
    return small.write_weights(tmp_path_factory.mktemp("quick") / "weights", small.quick("unused", "unused"))


@pytest.fixture(scope="session")
def all_weights(tmp_path_factory):
    """Starting weights of every network of InstantID, and of the critic of its identity loss."""
    return small.write_weights(tmp_path_factory.mktemp("all") / "weights", small.recipe("unused", "unused", loss__identity_weight=0.1))


@pytest.fixture(scope="session")
def program(weights):
    """The compiled side of `quick` runs."""
    return Program(small.quick("unused", weights), make_mesh())


@pytest.fixture
def make_run(tmp_path, source, weights, program):
    """``make_run(out="name", **fields)``: a quick run in the test's folder; nested fields as "guard__policy".

    It shares the session's compiled step, unless `fresh` says that a field changes the step itself.
    """

    def make(out="run", *, records=None, fresh=False, **fields):
        config = small.quick(tmp_path / out, weights, **fields)
        return Run(config, source=records or source, validation=source, program=None if fresh else program)

    return make


@pytest.fixture
def collected():
    """Orbax reads arrays side by side; where one cannot be read it leaves the others' coroutines to the collector, which tells of them.

    Tests that damage files let it tell at their own end, and pass over that with `pytest.PytestUnraisableExceptionWarning`.
    """
    yield
    gc.collect()
