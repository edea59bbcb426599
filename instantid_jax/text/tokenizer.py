"""Text to CLIP token ids, with the files of a published tokenizer folder and without torch.

The work is done by transformers' ``CLIPTokenizer``. This wrapper reads the folder, fixes the shape that SDXL expects
(``[bos] + ids + [eos]``, filled to 77 with the tokenizer's own padding token), and says what does not fit:

* SDXL's first tokenizer pads with ``<|endoftext|>`` (49407), its second with ``!`` (0). Padding is not masked in SDXL, so
  the difference is visible in the pictures.
* A prompt that spells out ``<|startoftext|>`` or ``<|endoftext|>`` would move the position from which the pooled text
  vector is taken. Such words are read as plain text, with a `TokenizerWarning`.

Ids are those of transformers 5. Before version 5 and without ftfy, transformers dropped control and joiner characters
(NUL, zero-width joiner) and put spaces around Chinese ones; all other texts give the same ids in both.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Tokenizer", "TokenizerError", "TokenizerWarning"]

Merges = list[tuple[str, str]]
_UNLIMITED = 10**9
_MIXED = "the folder's files do not belong together"


class TokenizerError(ValueError):
    """A tokenizer folder or a text that cannot be used."""


class TokenizerWarning(UserWarning):
    """A text that was not taken literally."""


class Tokenizer:
    """One of SDXL's two tokenizers.

    Attributes: `bos_id`, `eos_id`, `pad_id` (ints) and `length`, the number of positions of the text encoder (77).
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Merges, special: Mapping[str, str], length: int = 77) -> None:
        """Args: token -> id; the merges in order of precedence; bos_token, eos_token, unk_token and pad_token; positions.

        Raises `TokenizerError` for a special token or a merge that the vocabulary does not have.
        """
        # Imported only when needed, as it takes seconds. Without torch, transformers would print advice to install it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        for role, token in special.items():
            if token not in vocabulary:
                raise TokenizerError(f"{role} {token!r} is not in the vocabulary of {len(vocabulary)} tokens; {_MIXED}")
        self.length = length
        self.bos_id, self.eos_id, self.pad_id = (vocabulary[special[role]] for role in ("bos_token", "eos_token", "pad_token"))
        self._reserved = {special["bos_token"], special["eos_token"]}
        self._clip = CLIPTokenizer(vocab=dict(vocabulary), merges=_usable(merges, vocabulary), model_max_length=_UNLIMITED, **special)  # type: ignore[arg-type]

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads a published ``tokenizer/`` or ``tokenizer_2/`` folder.

        Needs vocab.json and merges.txt, or a tokenizer.json that holds both; the special tokens come from
        special_tokens_map.json and tokenizer_config.json. Raises `TokenizerError` naming the file that is missing or unfit.
        """
        folder = Path(path)
        added = folder / "added_tokens.json"
        if added.is_file():
            raise TokenizerError(f"{added}: added (textual inversion) tokens are not supported; remove the file to go on without them")
        vocabulary, merges = _read_bpe(folder)
        config = _read_json(folder / "tokenizer_config.json")
        known = config | (_read_json(folder / "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {})
        special: dict[str, str] = {}
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = known.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str):
                raise TokenizerError(f"{folder}: neither special_tokens_map.json nor tokenizer_config.json names the {role}")
            special[role] = token
        return cls(vocabulary, merges, special, int(config.get("model_max_length", 77)))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b, 77]: bos, at most 75 ids, eos, padding. What does not fit is cut: see `truncated`."""
        rows = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.bos_id, *self.encode_unbounded(text)[: self.length - 2], self.eos_id]
            row[: len(ids)] = ids
        return rows

    def encode_unbounded(self, text: str) -> list[int]:
        """All token ids of one text, without bos, eos, padding or limit."""
        return list(self._run(text)["input_ids"])

    def decode(self, ids: np.ndarray) -> list[str]:
        """Texts of token ids [b, n], without special tokens; casing and spaces are as the vocabulary keeps them."""
        texts = self._clip.batch_decode([[i for i in row if i not in (self.bos_id, self.eos_id, self.pad_id)] for row in np.asarray(ids).tolist()])
        return [text.strip() for text in texts]

    def truncated(self, text: str) -> str:
        """The end of `text` that `encode` cuts off, from the first word that is not wholly kept; "" where all of it fits."""
        starts = [start for start, _ in self._run(text, offsets=True)["offset_mapping"]]
        if len(starts) <= self.length - 2:
            return ""
        text = self._plain(text)
        kept = text[: starts[self.length - 2]]
        at = len(kept) if kept.endswith(tuple(" \t\r\n")) else len(kept) - len(kept.split()[-1])
        return text[at:].strip()

    def _run(self, text: str, offsets: bool = False) -> Any:
        return self._clip(self._plain(text), add_special_tokens=False, return_offsets_mapping=offsets)

    def _plain(self, text: str) -> str:
        """The text with reserved words broken up. Raises `TokenizerError` where it is no valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has an invalid character at position {error.start}; give the prompt as valid UTF-8") from error
        for word in self._reserved:
            if word in text:
                warnings.warn(f"{word!r} inside a prompt is read as plain text, not as the mark of its start or end", TokenizerWarning, stacklevel=4)
                text = text.replace(word, f"{word[:2]} {word[2:-2]} {word[-2:]}")
        return text


def _usable(merges: Merges, vocabulary: Mapping[str, int]) -> Merges:
    """The merges that can ever apply: those of which both halves exist. Raises where two tokens merge into an unknown one."""
    usable = [(left, right) for left, right in merges if left in vocabulary and right in vocabulary]
    for left, right in usable:
        if left + right not in vocabulary:
            raise TokenizerError(f"merge {left!r} + {right!r} gives a token that the vocabulary does not have; {_MIXED}")
    return usable


def _read_bpe(folder: Path) -> tuple[dict[str, int], Merges]:
    single = folder / "tokenizer.json"
    if not (folder / "vocab.json").is_file() and single.is_file():
        model = _read_json(single).get("model", {})
        if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
            raise TokenizerError(f"{single}: expected a byte-pair model with its vocabulary and merges")
        return model["vocab"], [_pair(single, m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    text = _read_text(folder / "merges.txt")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return _read_json(folder / "vocab.json"), [_pair(folder / "merges.txt", line.split()) for line in lines]


def _pair(file: Path, parts: Sequence[str]) -> tuple[str, str]:
    if len(parts) != 2:
        raise TokenizerError(f"{file}: a merge has two parts, not {len(parts)}: {' '.join(parts)!r}")
    return parts[0], parts[1]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenizerError(f"{file} is missing; a tokenizer folder holds vocab.json, merges.txt and tokenizer_config.json") from error


def _read_json(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: expected a JSON object")
    return value
