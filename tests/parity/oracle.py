"""The PyTorch side of the parity tests: equal seed-determined weights on both sides, and the measure of error.

Weights are made under the on-disk paths of this package and translated to the published names here, independently of
`convert_weights`, so that a mistake in its tables cannot cancel one in the networks.
"""

import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig as TorchCLIPTextConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from instantid_jax.config import CLIPTextConfig, IdentityNetConfig, UNetConfig
from instantid_jax.models.network import Network

torch.set_num_threads(1)
torch.set_grad_enabled(False)

Flat = dict[str, np.ndarray]

_NUMBERED = re.compile(r"^(to_out|net)_(\d+)$")


def random(name: str, *shape: int) -> np.ndarray:
    """Unit normal float32 numbers that depend on the name and the shape alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def tensor(path: str, shape: tuple[int, ...], seed: str = "") -> np.ndarray:
    """One weight, scaled so that activations keep their size through any depth."""
    x = random(seed + path, *shape)
    last = path.rsplit("/", 1)[-1]
    if last == "bias":
        return x * np.float32(0.05)
    if last == "scale":
        return 1 + np.float32(0.1) * x
    if last in ("embedding", "latents"):
        return x * np.float32(0.3)
    return x * np.float32(0.8 / np.sqrt(np.prod(shape[:-1])))


def weights(network: Network, seed: str = "") -> Flat:
    """Every tensor of a network under its on-disk path. No bias and no zero-initialised convolution is left at zero."""
    return {path: tensor(path, shape, seed) for path, shape in network.disk_shapes().items()}


def to_torch(flat: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, torch.Tensor]:
    """On-disk paths and layouts to a PyTorch state dict."""
    out: dict[str, torch.Tensor] = {}
    for path, x in flat.items():
        *parts, last = (_NUMBERED.sub(r"\1.\2", part) for part in path.split("/"))
        if last == "kernel":
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        name = ".".join([*parts, last if last in ("bias", "latents") else "weight"])
        out[name if name.startswith("text_projection") else prefix + name] = torch.from_numpy(np.ascontiguousarray(x))
    return out


def load(module: torch.nn.Module, flat: Mapping[str, np.ndarray], prefix: str = "") -> Any:
    """Puts weights into a PyTorch module; every name must be used and filled."""
    module.load_state_dict(to_torch(flat, prefix), strict=True)
    return module.eval()


def _shared(config: UNetConfig) -> dict[str, Any]:
    names = ("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "block_out_channels", "layers_per_block")
    names += ("transformer_layers_per_block", "attention_head_dim", "cross_attention_dim", "norm_num_groups", "norm_eps", "use_linear_projection")
    names += ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return {name: getattr(config, name) for name in names}


def torch_unet(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' UNet of the same configuration, with its own random weights."""
    extra = {"sample_size": config.sample_size, "out_channels": config.out_channels, "up_block_types": config.up_block_types}
    return UNet2DConditionModel(**_shared(config), **extra).eval()


def torch_controlnet(config: IdentityNetConfig) -> ControlNetModel:
    """diffusers' ControlNet of the same configuration."""
    widths = config.conditioning_embedding_out_channels
    return ControlNetModel(**_shared(config), conditioning_channels=config.conditioning_channels, conditioning_embedding_out_channels=widths).eval()


def torch_vae(config: Any) -> AutoencoderKL:
    """diffusers' autoencoder of the same configuration."""
    names = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    levels = len(config.block_out_channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**{name: getattr(config, name) for name in names}, **blocks).eval()


def torch_text(config: CLIPTextConfig, flat: Mapping[str, np.ndarray]) -> Any:
    """transformers' text tower of the same configuration, loaded. Its two classes name their tensors differently."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    names += ("hidden_act", "layer_norm_eps", "projection_dim", "eos_token_id")
    published = TorchCLIPTextConfig(**{name: getattr(config, name) for name in names})
    if config.with_projection:
        return load(CLIPTextModelWithProjection(published), flat, "text_model.")
    return load(CLIPTextModel(published), flat)


def nchw(x: Any) -> torch.Tensor:
    """[b, h, w, c] to a torch tensor [b, c, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x, np.float32).transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """The inverse of `nchw`."""
    return x.numpy().transpose(0, 2, 3, 1)


def error(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    assert np.isfinite(ours).all() and np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rms_error(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference over that of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(network: Network, function: Callable[..., Any], parameters: Any, arguments: Any) -> Any:
    return function(network.bind(parameters), *arguments)


def run(network: Network, flat: Mapping[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(module, *arguments)``, jitted, with weights under on-disk paths."""
    return _run(network, function, network.from_disk({p: jnp.asarray(x) for p, x in flat.items()}), arguments)
