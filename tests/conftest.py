"""What every test shares: full float32 products, checked shape annotations, and the golden case's weights on disk."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # nothing outside the tests' folders, in their processes too

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
# Shape annotations cost nothing at run time; in tests every call is checked against them.
install_import_hook(["instantid_jax.nn", "instantid_jax.models", "instantid_jax.diffusion"], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"
_MANY_MAPS = 25_000


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


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps() -> Iterator[None]:
    """Forgets compiled programs, which hold memory maps, before a process has the 65,530 that Linux gives it: compiling would then crash it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()


@pytest.fixture
def compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """``with compilations() as compiled:`` lists what is compiled within."""

    @contextlib.contextmanager
    def counted() -> Iterator[list[str]]:
        compiled: list[str] = []

        def listen(event: str, duration: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield compiled
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted
