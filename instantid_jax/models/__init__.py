"""One network a file, in the papers' words; `network` is the border to plain parameter trees."""

from instantid_jax.models.network import FROZEN, TRAINABLE, Network, WeightsMismatch, build_networks

__all__ = ["FROZEN", "TRAINABLE", "Network", "WeightsMismatch", "build_networks"]
