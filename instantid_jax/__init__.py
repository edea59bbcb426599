"""InstantID (arXiv 2401.07519) in JAX and Flax: pictures of a person from one photo and a prompt, and the training of it."""

from typing import TYPE_CHECKING, Any

from instantid_jax.config import ModelConfig, SchedulerConfig, UNetConfig, sdxl, tiny

if TYPE_CHECKING:
    from instantid_jax.face import FaceAnalyzer
    from instantid_jax.face_refine import refine_face
    from instantid_jax.people import Person
    from instantid_jax.pipeline import InstantIDPipeline

__version__ = "0.1.0"
__all__ = [
    "FaceAnalyzer",
    "InstantIDPipeline",
    "ModelConfig",
    "Person",
    "SchedulerConfig",
    "UNetConfig",
    "__version__",
    "refine_face",
    "sdxl",
    "tiny",
]

_LAZY = {
    "InstantIDPipeline": "instantid_jax.pipeline",
    "FaceAnalyzer": "instantid_jax.face",
    "Person": "instantid_jax.people",
    "refine_face": "instantid_jax.face_refine",
}


def __getattr__(name: str) -> Any:
    """Imports the heavy public names on first use, so that `import instantid_jax` stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'instantid_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
