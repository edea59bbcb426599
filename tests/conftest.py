"""What every test shares: full float32 products, checked shape annotations, and the golden case's weights on disk."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing outside the tests' folders, in their processes too

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
# Shape annotations cost nothing at run time; in tests every call is checked against them.
install_import_hook(["instantid_jax.nn", "instantid_jax.models", "instantid_jax.diffusion"], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, instantid/ and controlnet_2/ as published, holding the golden case's seed-determined weights.

    Session temporary folders belong to one xdist worker each, so workers do not meet; the case takes a second to write.
    """
    sys.path.insert(0, str(GOLDEN))
    try:
        from materialise import main
    finally:
        sys.path.remove(str(GOLDEN))
    out = tmp_path_factory.mktemp("golden")
    main(GOLDEN / "dev", out)
    return out
