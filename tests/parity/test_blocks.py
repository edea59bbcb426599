"""Every layer against its PyTorch counterpart, in float32: largest relative error 1e-5."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU as TorchGEGLU
from diffusers.models.attention import BasicTransformerBlock as TorchBlock
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding as TorchTimestepEmbedding
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from oracle import error, load, nchw, nhwc, random, run, tensor, weights
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from instantid_jax.config import CLIPTextConfig, ComputeConfig
from instantid_jax.models.clip_text import CLIPLayer
from instantid_jax.models.network import Network
from instantid_jax.models.vae import SelfAttention2D
from instantid_jax.nn.attention import Attention, dot_product_attention
from instantid_jax.nn.conv import Conv, Downsample, Upsample, resize_nearest
from instantid_jax.nn.embeddings import TimestepEmbedding, sinusoid
from instantid_jax.nn.norm import GroupNorm, LayerNorm
from instantid_jax.nn.resnet import ResnetBlock
from instantid_jax.nn.transformer import GEGLU, BasicTransformerBlock, FeedForward, Transformer2D

BOUND = 1e-5
F32 = jnp.float32


def block(cls: Any, *arguments: Any, compute: ComputeConfig | None = None, **options: Any) -> Network:
    """A single layer as a `Network`, so that it takes weights by path. Layers that take a bare dtype get float32."""
    takes_compute = compute or ComputeConfig()
    simple = cls in (Conv, Downsample, GroupNorm, LayerNorm, ResnetBlock, TimestepEmbedding, Upsample)

    def make(_: None, *, compute: ComputeConfig, rngs: Any) -> Any:
        given = {"dtype": jnp.dtype(compute.dtype)} if simple else {"compute": compute}
        return cls(*arguments, **options, **given, rngs=rngs)

    return Network(make, None, takes_compute)


def call(module: Any, *arguments: Any) -> Any:
    return module(*arguments)


def check(network: Network, reference: torch.nn.Module, x: np.ndarray) -> None:
    """One feature map or token array in, one out."""
    flat = weights(network)
    image = x.ndim == 4
    theirs = load(reference, flat)(nchw(x) if image else torch.from_numpy(x))
    assert error(run(network, flat, call, x), nhwc(theirs) if image else theirs) <= BOUND


@pytest.mark.parametrize(("groups", "epsilon"), [(8, 1e-5), (4, 1e-6)])
def test_group_norm(groups: int, epsilon: float) -> None:
    check(block(GroupNorm, 32, groups, epsilon), torch.nn.GroupNorm(groups, 32, eps=epsilon), random("norm", 2, 6, 5, 32) * 3 + 1)


def test_group_norm_with_a_large_mean() -> None:
    """A variance from E[x^2] - E[x]^2 would lose its digits here. The reference is in double precision."""
    network, x = block(GroupNorm, 32, 8, 1e-5), random("norm", 2, 6, 5, 32) * 0.1 + 10
    flat = weights(network)
    theirs = load(torch.nn.GroupNorm(8, 32), flat).double()(nchw(x).double())
    assert error(run(network, flat, call, x), nhwc(theirs)) <= BOUND


def test_group_norm_epsilon_matters() -> None:
    network, x = block(GroupNorm, 32, 8, 1e-6), random("norm", 1, 4, 4, 32) * 1e-3
    flat = weights(network)
    theirs = load(torch.nn.GroupNorm(8, 32, eps=1e-6), flat)(nchw(x))
    assert error(run(network, flat, call, x), nhwc(theirs)) <= BOUND
    assert error(run(block(GroupNorm, 32, 8, 1e-5), flat, call, x), nhwc(theirs)) > 0.1


def test_layer_norm() -> None:
    check(block(LayerNorm, 48), torch.nn.LayerNorm(48, eps=1e-5), random("layer", 2, 7, 48) * 0.01)


@pytest.mark.parametrize("size", [(8, 8), (15, 15), (7, 12)])
def test_convolutions(size: tuple[int, int]) -> None:
    x = random("conv", 2, *size, 8)
    check(block(Conv, 8, 12), torch.nn.Conv2d(8, 12, 3, padding=1), x)
    check(block(Conv, 8, 12, 1), torch.nn.Conv2d(8, 12, 1), x)
    check(block(Downsample, 8), Downsample2D(8, use_conv=True, padding=1, name="op"), x)
    check(block(Downsample, 8, asymmetric=True), Downsample2D(8, use_conv=True, padding=0, name="op"), x)
    check(block(Upsample, 8), Upsample2D(8, use_conv=True), x)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (15, 15)), ((32, 64), (63, 127)), ((5, 7), (5, 14)), ((64, 48), (8, 6)), ((9, 10), (4, 3))])
def test_nearest_resizing_to_a_size(old: tuple[int, int], new: tuple[int, int]) -> None:
    x = random("nearest", 2, *old, 8)
    assert np.array_equal(resize_nearest(jnp.asarray(x), new), nhwc(torch.nn.functional.interpolate(nchw(x), size=new, mode="nearest")))
    network = block(Upsample, 8)
    flat = weights(network)
    theirs = load(Upsample2D(8, use_conv=True), flat)(nchw(x), output_size=new)
    assert error(run(network, flat, lambda m, y: m(y, new), x), nhwc(theirs)) <= BOUND


def test_nearest_takes_the_first_pixel_of_each_run() -> None:
    ramp = jnp.arange(64.0).reshape(1, 64, 1)
    assert np.array_equal(resize_nearest(ramp, (8, 1))[0, :, 0], np.arange(0, 64, 8))


@pytest.mark.parametrize(("channels", "time"), [((32, 64), 48), ((32, 32), 48), ((32, 64), None)])
def test_resnet_block(channels: tuple[int, int], time: int | None) -> None:
    epsilon = 1e-5 if time else 1e-6
    network = block(ResnetBlock, *channels, 8, epsilon, time_channels=time)
    flat, x = weights(network), random("resnet", 2, 9, 6, 32)
    shape = {"in_channels": channels[0], "out_channels": channels[1], "groups": 8, "eps": epsilon, "temb_channels": time}
    temb = random("temb", 2, time) if time else None
    theirs = load(ResnetBlock2D(**shape), flat)(nchw(x), None if temb is None else torch.from_numpy(temb))
    assert error(run(network, flat, call, x, temb), nhwc(theirs)) <= BOUND


# One unit in the last place of float32 at 1000 radians: no float32 evaluation of the sinusoids can promise more.
ANGLE = 2.0**-14


def test_sinusoid_golden_numbers() -> None:
    """Numbers of an independent evaluation of the definition, in float32."""
    features = sinusoid(jnp.float32(958), 320)
    assert features.shape == (320,)
    np.testing.assert_allclose(features[:4], [-0.982796, 0.932903, 0.768155, -0.235762], rtol=0, atol=ANGLE)
    np.testing.assert_allclose(features[158:164], [0.994229, 0.994856, 0.184693, -0.360129, -0.640264, 0.971811], rtol=0, atol=ANGLE)
    np.testing.assert_allclose(features[-2:], [0.107283, 0.101302], rtol=0, atol=ANGLE)
    np.testing.assert_allclose(jnp.square(features).sum(), 160, rtol=1e-6)
    features = sinusoid(jnp.float32([1024.0, 0.0]), 256)
    np.testing.assert_allclose(features[0, :3], [0.987354, -0.537617, 0.683413], rtol=0, atol=ANGLE)
    np.testing.assert_allclose(features[0, 126:131], [0.993017, 0.993952, -0.158533, -0.843189, 0.730032], rtol=0, atol=ANGLE)
    np.testing.assert_allclose(features[0, -2:], [0.117974, 0.109818], rtol=0, atol=ANGLE)
    assert np.array_equal(features[1], [1.0] * 128 + [0.0] * 128)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoid(flip: bool, shift: int) -> None:
    t = np.float32([0, 1, 17.25, 500, 934.0721, 999])
    theirs = get_timestep_embedding(torch.from_numpy(t), 320, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    ours = sinusoid(jnp.asarray(t), 320, flip_sin_to_cos=flip, freq_shift=shift)
    frequencies = 10000.0 ** (-np.arange(160) / (160 - shift))
    waves = [np.cos(t[:, None] * frequencies), np.sin(t[:, None] * frequencies)]
    exact = np.concatenate(waves if flip else waves[::-1], axis=-1)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=ANGLE)
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=0, atol=BOUND)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * ANGLE)


def test_timestep_embedding() -> None:
    check(block(TimestepEmbedding, 32, 48), TorchTimestepEmbedding(32, 48), random("time", 3, 32))


def test_geglu_and_feed_forward() -> None:
    x = random("ff", 2, 10, 32) * 2
    check(block(GEGLU, 32, 128), TorchGEGLU(32, 128), x)
    check(block(FeedForward, 32), TorchFeedForward(32), x)


@pytest.mark.parametrize("backend", ["auto", "xla", "blocked"])
def test_attention(backend: str) -> None:
    compute = ComputeConfig(attention=backend)
    reference = {"query_dim": 32, "heads": 4, "dim_head": 8}
    x, context = random("x", 2, 300, 32), random("context", 2, 77, 24)
    check(block(Attention, 32, 32, 4, compute=compute), TorchAttention(**reference), x)
    network = block(Attention, 32, 24, 4, compute=compute)
    flat = weights(network)
    theirs = load(TorchAttention(**reference, cross_attention_dim=24), flat)(torch.from_numpy(x), torch.from_numpy(context))
    assert error(run(network, flat, lambda m, y, c: m(y, m.project(c)), x, context), theirs) <= BOUND


def test_attention_mask_leaves_keys_out() -> None:
    network = block(Attention, 32, 24, 4)
    flat, x, context = weights(network), random("x", 2, 20, 32), random("context", 2, 77, 24)
    keep = np.arange(77) < np.array([[50], [3]])
    full = load(TorchAttention(query_dim=32, heads=4, dim_head=8, cross_attention_dim=24), flat)
    theirs = torch.cat([full(torch.from_numpy(x[i : i + 1]), torch.from_numpy(context[i : i + 1, : keep[i].sum()])) for i in range(2)])
    ours = run(network, flat, lambda m, y, c, k: m(y, m.project(c), k), x, context, keep[:, None])
    assert error(ours, theirs) <= BOUND


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (1024, 257), (1100, 1100), (5, 600)])
def test_attention_backends_agree(queries: int, keys: int) -> None:
    q, k, v = (jnp.asarray(random(name, 2, n, 3, 16)) for name, n in (("q", queries), ("k", keys), ("v", keys)))
    plain, blocked = (dot_product_attention(q, k, v, backend=backend) for backend in ("xla", "blocked"))
    assert error(blocked, plain) <= 1e-6
    theirs = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v)))
    assert error(blocked, theirs.transpose(1, 2)) <= BOUND


def test_basic_transformer_block() -> None:
    network = block(BasicTransformerBlock, 32, 24, 4)
    flat, x, context = weights(network), random("x", 2, 30, 32), random("context", 2, 77, 24)
    reference = load(TorchBlock(32, 4, 8, cross_attention_dim=24), flat)
    theirs = reference(torch.from_numpy(x), encoder_hidden_states=torch.from_numpy(context))
    assert error(run(network, flat, lambda m, y, c: m(y, m.attn2.project(c), None, None), x, context), theirs) <= BOUND


def transformer(network: Network, flat: dict[str, np.ndarray], x: np.ndarray, context: np.ndarray) -> Any:
    return run(network, flat, lambda m, y, c: m(y, m.project(c)), x, context)


@pytest.mark.parametrize("linear", [True, False])
def test_transformer_2d(linear: bool) -> None:
    network = block(Transformer2D, 32, 24, 4, 3, 8, linear=linear)
    flat, x, context = weights(network), random("x", 2, 9, 6, 32), random("context", 2, 77, 24)
    shape = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 32, "num_layers": 3, "cross_attention_dim": 24}
    reference = load(Transformer2DModel(**shape, norm_num_groups=8, use_linear_projection=linear), flat)
    (theirs,) = reference(nchw(x), encoder_hidden_states=torch.from_numpy(context), return_dict=False)
    assert error(transformer(network, flat, x, context), nhwc(theirs)) <= BOUND


@pytest.mark.parametrize("other", [ComputeConfig(unroll=True), ComputeConfig(remat=True), ComputeConfig(attention="xla")])
def test_transformer_2d_switches_change_no_number(other: ComputeConfig) -> None:
    plain, switched = (block(Transformer2D, 32, 24, 4, 3, 8, compute=c) for c in (ComputeConfig(attention="blocked"), other))
    flat, x, context = weights(plain), random("x", 2, 18, 17, 32), random("context", 2, 77, 24)
    assert error(transformer(switched, flat, x, context), transformer(plain, flat, x, context)) <= 1e-6


def test_vae_attention() -> None:
    network = block(SelfAttention2D, 32, 8)
    reference = TorchAttention(32, heads=1, dim_head=32, norm_num_groups=8, eps=1e-6, bias=True, residual_connection=True, upcast_softmax=True)
    check(network, reference, random("vae", 2, 18, 17, 32))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_layer(activation: str) -> None:
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "hidden_act": activation, "layer_norm_eps": 1e-5}
    network = block(CLIPLayer, CLIPTextConfig(**shape))
    flat, x = weights(network), random("clip", 2, 77, 48)
    published = TorchCLIPTextConfig(**shape)
    published._attn_implementation = "eager"
    causal = torch.full((77, 77), -torch.inf).triu(1)[None, None]
    theirs = load(CLIPEncoderLayer(published), flat)(torch.from_numpy(x), causal)
    assert error(run(network, flat, call, x), theirs) <= BOUND


def test_weights_of_the_tests_depend_on_the_path_alone() -> None:
    assert np.array_equal(tensor("a/kernel", (3, 4)), tensor("a/kernel", (3, 4)))
    assert not np.array_equal(tensor("a/kernel", (3, 4)), tensor("b/kernel", (3, 4)))
