"""Style templates: a prompt and a negative prompt around the user's own, from files as Fooocus and sdxl_styles have them.

    [{"name": "Watercolor", "prompt": "watercolor painting, {prompt}. vibrant", "negative_prompt": "noisy"}, ...]

As in the published demo of InstantID the user's prompt takes the place of ``{prompt}``, and the user's negative prompt follows
the style's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from instantid_jax.published import did_you_mean

__all__ = ["Style", "StyleError", "find_style", "packaged_styles", "read_styles"]

_PLACE = "{prompt}"
_FIELDS = ("name", "prompt", "negative_prompt")
_MAX_BYTES = 1 << 22


class StyleError(ValueError):
    """A style that is not known, or a file of styles that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Style:
    """A template."""

    name: str
    prompt: str = _PLACE
    """With ``{prompt}`` where the user's prompt goes."""
    negative_prompt: str = ""

    def apply(self, prompt: str, negative_prompt: str | None = None) -> tuple[str, str | None]:
        """(prompt, negative prompt) in this style. A negative prompt that is left out stays so where the style has none either."""
        both = f"{self.negative_prompt} {negative_prompt or ''}".strip()
        return self.prompt.replace(_PLACE, prompt), negative_prompt if negative_prompt is None and not both else both


@functools.cache
def packaged_styles() -> tuple[Style, ...]:
    """The nine of the published demo, and five short ones in words that the small model knows."""
    return _styles(json.loads((resources.files("instantid_jax") / "assets" / "styles.json").read_text(encoding="utf-8")))


def read_styles(path: Path) -> tuple[Style, ...]:
    """The styles of a JSON file; entries without `prompt` change the negative prompt alone. Raises `StyleError` naming file and entry."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise StyleError(f"{path}: is larger than {_MAX_BYTES >> 20} MB, which no file of styles is")
        return _styles(json.loads(path.read_text(encoding="utf-8")))
    except StyleError as error:
        raise StyleError(f"{path}: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StyleError(f"{path}: cannot be read as JSON ({error})") from error
    except OSError as error:
        raise StyleError(f"{path}: {error.strerror or error}") from error


def find_style(name: str, styles: Iterable[Style]) -> Style:
    """The style of that name, in which capitals do not count, and "-" and "_" are spaces; of two alike the last. Raises `StyleError`."""
    known = {_plain(style.name): style for style in styles}
    if _plain(name) not in known:
        names = [style.name for style in known.values()]
        listed = ", ".join(names) if len(names) <= 30 else f"there are {len(names)}, among them {', '.join(names[:10])}"
        raise StyleError(f"there is no style {name!r}{did_you_mean(name, names)} ({listed})")
    return known[_plain(name)]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


def _styles(content: Any) -> tuple[Style, ...]:
    if not isinstance(content, list) or not content:
        raise StyleError("must be a list of styles, each with name, prompt and negative_prompt")
    return tuple(_style(entry, number) for number, entry in enumerate(content, 1))


def _style(entry: Any, number: int) -> Style:
    if not isinstance(entry, dict):
        raise StyleError(f"entry {number} must be an object with name, prompt and negative_prompt, not {str(entry)[:40]!r}")
    where = f"entry {number}"
    for field in entry:
        if field not in _FIELDS:
            raise StyleError(f"{where} has an unknown field {field!r}{did_you_mean(field, _FIELDS)}")
    for field in _FIELDS:
        if not isinstance(entry.get(field, ""), str):
            raise StyleError(f"{where}: {field} must be a text, not {entry[field]!r}")
    if not entry.get("name", "").strip():
        raise StyleError(f"{where} has no name")
    style = Style(entry["name"], entry.get("prompt") or _PLACE, entry.get("negative_prompt", ""))
    if _PLACE not in style.prompt:
        raise StyleError(f"{where} ({style.name}): prompt must hold {_PLACE}, where the user's prompt goes")
    return style
