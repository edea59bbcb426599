"""The platform that a program is traced for, by which layers choose between equal forms of the same arithmetic."""

from __future__ import annotations

import jax

__all__ = ["target_platform"]


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": the current mesh's (`jax.set_mesh`), so that one may compile for machines not at hand; else this process's.

    For any other name layers take the form that defines them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
