"""The settings that a picture holds, read as what they are: text from a stranger.

What is accepted is one flat JSON object of at most `MAX_TEXT` characters, each key known and once, each value of its key's type: an
option of ``sample.py`` as it is declared there, or one of `_FACTS`. Names of files are names alone, without folders; nothing here
opens one. Anything else is refused with one sentence. Pixels are not decoded.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from instantid_jax.output import READ, settings_text
from instantid_jax.published import did_you_mean
from instantid_jax.sample_options import SampleOptions
from instantid_jax.strengths import StrengthError, read_strength

__all__ = ["FILES", "MAX_TEXT", "MetadataError", "check_settings", "read_recorded"]

MAX_TEXT = 1 << 17
"""Characters of settings that are looked at; a long prompt has a hundredth of it."""
FILES = ("face", "blend", "pose", "control", "mask", "init", "redrawn", "people", "lora", "controlnet", "preprocessor")
"""Kinds of files of which the settings hold lists of SHA-256, as `face_sha256`."""

_MAX_FILE = 1 << 30
_MAX_DEPTH, _MAX_ITEMS, _MAX_LENGTH, _MAX_NUMBER = 4, 4096, 1 << 15, 2**32
_HASH = re.compile(r"[0-9a-f]{64}")
_NEEDED = ("prompt", "seed", "size", "steps", "sampler", "guidance_scale", "identitynet_scale", "ip_adapter_scale", "weights_sha256", "version")


class MetadataError(ValueError):
    """Settings that are refused; the message names the file, the key and what is wrong."""


def read_recorded(path: Path) -> dict[str, Any]:
    """The settings of a picture by ``sample.py``, checked. Raises `MetadataError`, or OSError where there is no such file."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise MetadataError(f"{path}: is larger than {_MAX_FILE >> 20} MB, which no picture here is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its size or broken chunks: nothing is decoded
            with Image.open(path, formats=READ) as image:
                text = settings_text(image)
    except UnidentifiedImageError as error:
        raise MetadataError(f"{path}: is no PNG, JPEG or WebP picture") from error
    except MetadataError:
        raise
    except (Image.DecompressionBombError, SyntaxError, ValueError, KeyError, TypeError, IndexError, EOFError, OverflowError) as error:
        raise MetadataError(f"{path}: its settings cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
    if text is None:
        raise MetadataError(f"{path}: holds no settings of sample.py; many programs and websites remove them from pictures")
    try:
        return check_settings(_parse(text))
    except ValueError as error:
        raise MetadataError(f"{path}: its settings are refused: {error}") from error


def _parse(text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise ValueError(f"they have {len(text)} characters, at most {MAX_TEXT} are read")
    if _depth(text) > _MAX_DEPTH:
        raise ValueError(f"they are nested more than {_MAX_DEPTH} deep")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"they are no JSON ({error})") from error


def _depth(text: str) -> int:
    """How deep brackets outside of strings are nested, in one pass."""
    depth = deepest = 0
    within = escaped = False
    for character in text:
        if within:
            within = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            within = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def check_settings(content: Any) -> dict[str, Any]:
    """The settings, each known and of its type. Raises ValueError naming the first that is not."""
    if not isinstance(content, dict):
        raise ValueError("they must be one JSON object")
    for key, value in content.items():
        if key not in _SCHEMA:
            raise ValueError(f"unknown key {_short(key)}{did_you_mean(key[:100], _SCHEMA)}")
        if problem := _SCHEMA[key](value):
            raise ValueError(f"{key} must be {problem}, not {_short(value)}")
    for key in _NEEDED:
        if content.get(key) is None:
            raise ValueError(f"{key} is missing")
    batch = content.get("batch")
    if batch is not None:
        _check_batch(batch, content)
    if content.get("face_vector") is not None and (content.get("face_keypoints") is None) != (content.get("face_size") is None):
        raise ValueError("face_keypoints and face_size go together")
    return content


def _check_batch(batch: dict[str, Any], content: dict[str, Any]) -> None:
    for key, value in batch.items():
        if key not in _BATCH:
            raise ValueError(f"unknown key {_short(key)} in batch")
        if problem := _BATCH[key](value):
            raise ValueError(f"{key} of batch must be {problem}, not {_short(value)}")
    if not {"count", "index"} <= set(batch) or batch["index"] >= batch["count"]:
        raise ValueError("batch must say which picture of how many")
    texts = batch.get("prompts"), batch.get("negative_prompts")
    if (texts[0] is None) != (texts[1] is None) or ("face" in content) != (texts[0] is not None):
        raise ValueError("prompts and negative_prompts of batch go together, and with face")
    if texts[0] is not None and texts[1] is not None and not (texts[0] and len(texts[0]) == len(texts[1]) and batch["count"] % len(texts[0]) == 0):
        raise ValueError("batch has prompts that do not go evenly into its pictures")


Check = Callable[[Any], str | None]
"""None for a value that is right, else what it must be."""


def _is(kind: Any, what: str, test: Callable[[Any], bool] = lambda _: True) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool) and test(value)
        return None if right else what

    return check


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _several(check: Check, count: int | None = None, most: int = _MAX_ITEMS) -> Check:
    def whole(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) > most or (count is not None and len(value) != count):
            return "a list" + (f" of {count}" if count is not None else f" of at most {most}")
        problem = next((found for item in value if (found := check(item))), None)
        return problem and f"a list, each {problem}"

    return whole


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 255 and text not in (".", "..") and not re.search(r"[/\\:\x00-\x1f\x7f]", text)


def _is_strength(value: Any) -> bool:
    if len(value) > _MAX_LENGTH if isinstance(value, str) else abs(value) > _MAX_NUMBER:
        return False
    try:
        read_strength(value)
    except StrengthError:
        return False
    return True


_TEXT = _is(str, f"a text of at most {_MAX_LENGTH} characters", lambda text: len(text) <= _MAX_LENGTH and "\0" not in text)
_LINE = _is(str, "a line of at most 1000 printable characters", lambda text: len(text) <= 1000 and text.isprintable())
_NAME = _is(str, "a name without folders", _is_name)
_WHOLE = _is(int, f"a whole number from {-_MAX_NUMBER} to {_MAX_NUMBER}", lambda value: abs(value) <= _MAX_NUMBER)
_REAL = _is((int, float), f"a number from {-_MAX_NUMBER} to {_MAX_NUMBER}", lambda value: abs(value) <= _MAX_NUMBER)
_HASHED = _is(str, "a SHA-256 in 64 small hexadecimal digits", lambda text: _HASH.fullmatch(text) is not None)
_KINDS: dict[Any, Check] = {
    str: _TEXT,
    int: _WHOLE,
    float: _REAL,
    float | str: _is((int, float, str), "a strength: a number from -10 to 10, or a schedule such as 'linear(1, 0.3)'", _is_strength),
    bool: _is(bool, "true or false"),
    Path: _NAME,
}


def _of_hint(hint: Any) -> Check:
    """What is accepted for an option that is declared with this type."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kind = functools.reduce(operator.or_, (option for option in options if option is not type(None)))
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        check = _is(str, f"one of {', '.join(known)}", lambda value: value in known)
    elif typing.get_origin(kind) is tuple:
        check = _several(_KINDS[typing.get_args(kind)[0]], most=256)
    else:
        check = _KINDS[kind]
    return _optional(check) if type(None) in options else check


_NOT_STORED = ("num_images", "style_file", "wildcards", "prompt_file", "people", "face", "blend", "pose", "control_image", "control_mask")
_NOT_STORED += ("control_model", "init_image", "mask_image")
_NOT_STORED += ("out", "jobs", "replay", "allow_changed_files", "aot", "aot_json", "distributed", "coordinator", "processes", "process")
_SCHEMA: dict[str, Check] = {
    **{name: _of_hint(hint) for name, hint in typing.get_type_hints(SampleOptions).items() if name not in _NOT_STORED},
    "seed": _is(int, f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    "size": _is(str, "WIDTHxHEIGHT in pixels", lambda text: re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text) is not None),
    **{f"{kind}_sha256": _several(_HASHED, most=256) for kind in FILES},
    **{f"{kind}_sha256": _HASHED for kind in ("weights", "analyzer")},
    **dict.fromkeys(("model", "face"), _NAME),
    **dict.fromkeys(("version", "made_with"), _LINE),
    "variant": _TEXT,
    "sheet": _is(bool, "true or false"),
    "batch": _is(dict, "an object"),
    "face_vector": _several(_REAL),
    "face_keypoints": _several(_several(_REAL, 2), 5),
    "face_size": _several(_is(int, "a whole number from 1 to 65536", lambda value: 1 <= value <= 65536), 2),
}
"""Check of each key. Ranges that depend on the model and on each other are checked as those of options are."""
_BATCH: dict[str, Check] = {
    "count": _is(int, "a whole number from 1 to 4096", lambda value: 1 <= value <= 4096),
    "index": _is(int, "a whole number from 0 to 4095", lambda value: 0 <= value <= 4095),
    "prompts": _several(_TEXT),
    "negative_prompts": _several(_optional(_TEXT)),
}


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else f"a {'list' if isinstance(value, list) else 'n object'} of {len(value)}"
    return (text if len(text) <= 60 else text[:57] + "...").replace("a n ", "an ")
