"""Where weights come from: the base, random numbers, a folder; and what is trained of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from instantid_jax.checkpoint import save_weights
from instantid_jax.models import WeightsMismatch
from instantid_jax.paths import PathError, flatten
from instantid_jax.training.config import InitConfig, StageConfig
from instantid_jax.training.networks import training_networks
from instantid_jax.training.state import InitError, initial_parameters, merge, split

ZERO = ("controlnet_down_blocks/", "controlnet_mid_block/", "controlnet_cond_embedding/conv_out/")


@pytest.fixture(scope="module")
def networks():
    return training_networks(small.recipe("unused", "unused"))


@pytest.fixture(scope="module")
def start(networks, all_weights):
    """The paper's start, flat: IdentityNet and adapter from the UNet, a random resampler."""
    return flatten(initial_parameters(networks, InitConfig(weights=str(all_weights)), jax.random.key(0)))


def of(flat, network):
    return {path.removeprefix(f"{network}/"): leaf for path, leaf in flat.items() if path.startswith(f"{network}/")}


def test_identitynet_is_the_unet_s_encoder_with_all_its_embeddings(start):
    unet, net = of(start, "unet"), of(start, "identitynet")
    copied = {path for path in net if not path.startswith("controlnet_")}
    assert {path for path in copied if path.startswith("add_embedding/")} == {path for path in unet if path.startswith("add_embedding/")} != set()
    assert copied == {path for path in unet if not path.startswith(("up_blocks/", "conv_norm_out/", "conv_out/"))}
    for path in copied:
        np.testing.assert_array_equal(net[path], unet[path])


def test_zero_convolutions_are_zero_and_the_keypoint_convolutions_are_not(start):
    net = of(start, "identitynet")
    zero = {path for path in net if path.startswith(ZERO)}
    assert len(zero) > 6 and all(not np.any(net[path]) for path in zero)
    rest = {path for path in net if path.startswith("controlnet_cond_embedding/") and path not in zero and path.endswith("kernel")}
    assert rest and all(np.std(net[path]) > 0.01 for path in rest)


def test_the_adapter_s_keys_and_values_are_the_text_s(start):
    unet, adapter = of(start, "unet"), of(start, "adapter")
    assert len(adapter) == 2 * sum(path.endswith("attn2/to_k/kernel") for path in unet)
    for path, leaf in adapter.items():
        np.testing.assert_array_equal(leaf, unet[path.replace("to_k_ip", "to_k").replace("to_v_ip", "to_v")])


def test_nothing_is_shared_between_networks(start):
    """The step overwrites the trained weights' memory: a frozen array must not lie there."""
    places = [leaf.unsafe_buffer_pointer() for path, leaf in start.items() if isinstance(leaf, jax.Array) and path.startswith(("unet/", "adapter/"))]
    assert len(places) == len(set(places))


def test_converted_weights_replace_any_start(networks, all_weights):
    found = flatten(initial_parameters(networks, InitConfig(str(all_weights), from_base=(), random=()), jax.random.key(0)))
    for number, (name, network) in enumerate(networks.items()):
        wanted = flatten(small.draw(network.abstract, number)) if name in ("vae", "unet") else {}
        mine = of(found, name)
        for path in wanted:
            np.testing.assert_allclose(np.asarray(mine[path]).shape, wanted[path].shape)
    again = flatten(initial_parameters(networks, InitConfig(str(all_weights), from_base=(), random=()), jax.random.key(9)))
    for path in found:
        np.testing.assert_array_equal(found[path], again[path])
    assert any(np.any(found[f"identitynet/{path}"]) for path in of(found, "identitynet") if path.startswith(ZERO))


def test_random_starts_follow_from_the_key(networks, all_weights):
    only = ("resampler",)
    one, same, other = (initial_parameters(networks, InitConfig(str(all_weights)), jax.random.key(n), only) for n in (0, 0, 1))
    assert one.keys() == {"resampler"}
    equal = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True)]
    differ = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    assert all(equal) and not all(differ)


def test_a_start_that_begins_to_learn_sooner(networks, all_weights):
    """`condition_gain`: variance gain / fan-in, half the deviation in the last layer, and nothing else changes."""
    init = InitConfig(str(all_weights), condition_gain=2.5)
    net = of(flatten(initial_parameters(networks, init, jax.random.key(0), ("identitynet",))), "identitynet")
    for path, leaf in net.items():
        if path.startswith("controlnet_cond_embedding/") and path.endswith("kernel"):
            deviation = (2.5 / np.prod(leaf.shape[:-1])) ** 0.5 * (0.5 if "conv_out" in path else 1)
            assert abs(np.std(leaf) / deviation - 1) < 5 / np.sqrt(2 * leaf.size), path
        elif path.startswith(ZERO):
            assert not np.any(leaf), path


@pytest.mark.parametrize(
    ("init", "says"),
    [
        (InitConfig(), "vae has no start: name a folder in init.weights"),
        (InitConfig("/nowhere"), "there is no folder /nowhere, which init.weights names"),
    ],
)
def test_a_network_without_a_start_is_named(networks, init, says):
    with pytest.raises(InitError, match=says):
        initial_parameters(networks, init, jax.random.key(0), ("vae", "text_encoder"))


def test_an_identitynet_of_another_shape(networks, all_weights, tmp_path):
    model = small.model()
    unet = dataclasses.replace(model.unet, block_out_channels=(32, 64))
    other = training_networks(small.recipe("x", "x", model=dataclasses.replace(model, unet=unet)))["unet"]
    save_weights(tmp_path / "unet", other.to_disk(small.draw(other.abstract)))
    with pytest.raises(InitError, match=r"identitynet cannot start from this unet: \S+ and \d+ others differ"):
        initial_parameters(networks | {"unet": other}, InitConfig(str(tmp_path)), jax.random.key(0), ("identitynet",))
    with pytest.raises(WeightsMismatch, match="weights do not fit unet"):
        initial_parameters(networks, InitConfig(str(tmp_path)), jax.random.key(0), ("unet",))


TREE = {"unet": {"attn2": {"to_q": {"kernel": jnp.zeros(2)}, "to_k": {"kernel": jnp.zeros(2)}}}, "adapter": {"x": jnp.ones(1)}}


def test_one_network_may_be_trained_in_part():
    trained, frozen = split(TREE, StageConfig(trainable=(r"^adapter/", r"^unet/.*attn2/to_q/")))
    assert flatten(trained).keys() == {"adapter/x", "unet/attn2/to_q/kernel"}
    assert flatten(frozen).keys() == {"unet/attn2/to_k/kernel"}
    assert jax.tree.structure(merge(trained, frozen)) == jax.tree.structure(TREE)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(PathError, match="'\\^adaptor/' matches none"):
        split(TREE, StageConfig(trainable=(r"^adaptor/",)))
