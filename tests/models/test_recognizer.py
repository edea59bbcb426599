"""The recogniser of latents: its shape by its configuration."""

import jax
import jax.numpy as jnp
import pytest

from instantid_jax.config import ComputeConfig, ConfigError
from instantid_jax.models import Network
from instantid_jax.models.recognizer import Recognizer, RecognizerConfig
from instantid_jax.paths import flatten


def network(**fields):
    return Network(Recognizer, RecognizerConfig(norm_num_groups=4, latent_channels=8, embedding_dim=5, **fields), ComputeConfig())


@pytest.mark.parametrize(("widths", "layers", "blocks"), [((8,), 1, 1), ((8, 12), 1, 2), ((8, 12, 16), 2, 6)])
def test_blocks_at_each_resolution(widths, layers, blocks):
    made = network(widths=widths, layers_per_block=layers)
    paths = flatten(made.abstract)
    assert {path.split("/")[1] for path in paths if path.startswith("resnets/")} == set(map(str, range(blocks)))
    assert {path.split("/")[1] for path in paths if path.startswith("downsamplers/")} == set(map(str, range(len(widths) - 1)))
    for i in range(blocks):
        assert paths[f"resnets/{i}/conv2/kernel"].shape[-1] == widths[i // layers]
    read = made.bind(made.init(jax.random.key(0)))(jax.random.normal(jax.random.key(1), (3, 16, 16, 8)))
    assert read.shape == (3, 5) and read.dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"widths": ()}, "widths"), ({"widths": (6,)}, "divisible by norm_num_groups 4"), ({"layers_per_block": 0}, "at least 1, not 0")],
)
def test_shapes_that_are_none(fields, said):
    with pytest.raises(ConfigError, match=said):
        RecognizerConfig(norm_num_groups=4, **fields)


def test_more_than_ten_blocks_keep_their_order():
    """Places in a list are numbers: as texts, "10" would come before "2"."""
    made = network(widths=(4, 8, 12), layers_per_block=4)
    parameters = made.init(jax.random.key(0))
    module = made.bind(parameters)
    for i, block in enumerate(module.resnets):
        assert block.conv1.kernel[...] is parameters["resnets"][str(i)]["conv1"]["kernel"]
    assert made.bind(parameters)(jnp.ones((1, 16, 16, 8))).shape == (1, 5)
