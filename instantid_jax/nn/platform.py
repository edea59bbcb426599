"""The platform that a program is traced for, by which layers choose between equal forms of the same arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["as_defined", "target_platform"]


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": the current mesh's (`jax.set_mesh`), so that one may compile for machines not at hand; else this process's.

    Within `as_defined` it is another name, for which layers take the form that defines them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def as_defined() -> Iterator[None]:
    """Within it programs are traced as the networks are defined, in no platform's forms: to count operations. Not for within a mesh."""
    device = jax.sharding.AbstractDevice("any", None, "any")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        yield
