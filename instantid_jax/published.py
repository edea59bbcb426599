"""Reading of published ``config.json`` files: known fields are taken, harmless ones passed over, everything else refused by name.

A refusal names what was probably meant; `nearest` and `did_you_mean` serve all other refusals too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and what is accepted."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The one of the `known` names that is spelled most like `word`; None where none is at least `cutoff` (0 to 1) alike."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a refusal: "; did you mean 'euler'?", or nothing where no known name is near."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


# Fields of the published files that do not change what is computed here, whatever their value.
_INFORMATIVE = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_use_default_values",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "clip_sample_range",
    "dropout",
    "dtype",
    "initializer_factor",
    "initializer_range",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
}


def require(owner: str, field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{owner}: {field}={value!r} is not supported; supported: {choices}")


def broadcast(value: Any, length: int) -> tuple[Any, ...]:
    """Broadcasts a published scalar to one entry a block."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * length


def read_fields(
    cls: type[Any], published: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], skip: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Splits a published dict into the fields of `cls`, checking every other field against `fixed`."""
    name = str(published.get("_class_name", cls.__name__))
    own = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    taken: dict[str, Any] = {}
    for key, value in published.items():
        if key in own:
            taken[key] = tuple(value) if isinstance(value, list) else value
        elif key in fixed:
            require(name, key, value, fixed[key])
        elif key not in _INFORMATIVE and key not in skip:
            raise ConfigError(f"{name}: unknown field {key!r} = {value!r}{did_you_mean(key, own | set(fixed))}")
    return taken


UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type_num_heads": (64, None),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, None),
}

CONTROLNET_FIXED = {k: v for k, v in UNET_FIXED.items() if k not in ("conv_out_kernel",)} | {
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}


# What diffusers takes for a field that a published UNet or ControlNet does not name; our own defaults are SDXL's.
UNET_DEFAULTS: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "projection_class_embeddings_input_dim": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
UP_DEFAULTS: dict[str, Any] = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}


def read_unet(cls: type, published: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `cls` in a published UNet's or ControlNet's configuration; one that is not there has diffusers' default."""
    published = dict(defaults) | dict(published)
    heads = published.pop("num_attention_heads", None)
    if heads is not None:
        published["attention_head_dim"] = heads
    layers = published.get("layers_per_block")
    if isinstance(layers, list | tuple):
        if len(set(layers)) != 1:
            raise ConfigError(f"{cls.__name__}: layers_per_block={layers!r}: only equal numbers are supported")
        published["layers_per_block"] = layers[0]
    return read_fields(cls, published, fixed)


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass of what JSON gave. Raises `ConfigError` naming any field that it does not have or whose value is of another type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown field {key!r}{did_you_mean(key, fields)}")
        arguments[key] = _convert(hints[key], value, f"{where}.{key}")
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A value of a field of this type: lists become tuples, integers floats where floats are asked for."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
    elif isinstance(value, list):
        for option in options:
            inner = typing.get_args(option) if typing.get_origin(option) is tuple else ()
            if inner and (inner[-1] is ... or len(inner) == len(value)):
                kinds = inner[:1] * len(value) if inner[-1] is ... else inner
                return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    elif any(_is_of(value, option) for option in options):
        return value
    elif float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise ConfigError(f"{where}: {value!r} is not a {hint}")


_MAY_BE_ZERO = ("freq_shift", "steps_offset", "eos_token_id")
_ANY_NUMBER = ("shift_factor", "latents_mean")
_EACH_BLOCK = ("transformer_layers_per_block", "attention_head_dim")


def checked(cls: type[Any], taken: dict[str, Any]) -> dict[str, Any]:
    """Fields out of a published file, each of its type and in its range. A size that is left open (null) is the default."""
    hints, out = typing.get_type_hints(cls), {}
    for key, value in taken.items():
        where, hint = f"{cls.__name__}: {key}", hints[key]
        if value is None and key == "sample_size":
            continue
        if key in _EACH_BLOCK and not isinstance(value, tuple | list):
            hint = typing.get_args(hint)[0]  # one number for all blocks
        out[key] = _convert(hint, list(value) if isinstance(value, tuple) else value, where)
        if out[key] == ():
            raise ConfigError(f"{where} is empty")
        for number in out[key] if isinstance(out[key], tuple) else (out[key],):
            if isinstance(number, bool | str) or number is None or (key in _ANY_NUMBER and math.isfinite(number)):
                continue
            if not math.isfinite(number) or number < 0 or (number == 0 and key not in _MAY_BE_ZERO):
                raise ConfigError(f"{where}={number} is out of range; it must be {'0 or more' if key in _MAY_BE_ZERO else 'positive'}")
    return out


def _is_of(value: Any, option: Any) -> bool:
    """Whether a value is of a type, or one of a Literal's; True and False are no numbers."""
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    return isinstance(option, type) and isinstance(value, option) and not (isinstance(value, bool) and option is not bool)
