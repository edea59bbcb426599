"""Prompt weighting and prompts of any length.

The grammar, as in AUTOMATIC1111's web UI and InstantID's full pipeline:

    prompt  := item*
    item    := "(" item* ")"              weight x 1.1
             | "(" item* ":" number ")"   weight x number
             | "[" item* "]"              weight / 1.1
             | "\\" one of ( ) [ ] \\     that character
             | BREAK                      a piece of its own with weight -1
             | any other text             weight 1

Weights of nested brackets multiply. A bracket that is never closed reaches to the end of the prompt; a closing one that
closes nothing is text; round and square brackets may overlap. A backslash before anything else vanishes.

Tokens of all pieces in a row, c_1 .. c_m, are cut into groups of 75, each encoded by itself as [bos] + 75 + [eos]. The
last group, [bos] + rest + [eos], is as long as it needs to be, down to two tokens where m is a multiple of 75. With e_j
the encoder's states of a group of n positions and w_j the weights (1 for bos and eos),

    e_j <- e_n + (e_j - e_n) w_j        where w_j != 1                                                             (1)

and the groups' states follow one another. Groups are stored with 77 positions, the rest filled with eos: the encoders are
causal, so this leaves the first n positions as they are, and `lengths` says which positions count.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from instantid_jax.text.tokenizer import Tokenizer

__all__ = ["PromptError", "WeightedTokens", "apply_weights", "encode_weighted", "flatten_groups", "parse"]

_LEXEME = re.compile(
    r"""\\ (?P<escaped> [()\[\]\\] )?
    | (?P<open> [(\[] )
    | : (?P<number> [+-]?[.\d]+ ) \)
    | (?P<close> [)\]] )
    | [^\\()\[\]:]+ | :""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_FACTOR = {"(": 1.1, "[": 1 / 1.1}
_OPENS = {")": "(", "]": "["}


class PromptError(ValueError):
    """A prompt whose weights cannot be read."""


@dataclasses.dataclass(frozen=True)
class WeightedTokens:
    """One prompt in groups of 77 positions.

    ids: int32 [g, 77], bos, at most 75 tokens, eos, filled with eos. weights: float32 [g, 77]. lengths: int32 [g], how many
    positions of each group count, 2 to 77.
    """

    ids: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray


def parse(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt with their weights; neighbours of equal weight are joined.

    Raises `PromptError` for a weight that is not a number, as in ``(a:1.2.3)``.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for lexeme in _LEXEME.finditer(prompt):
        text, closes = lexeme[0], _OPENS.get(lexeme["close"] or "")
        if text.startswith("\\"):
            pieces.append((lexeme["escaped"] or "", 1.0))
        elif lexeme["open"]:
            opened[text].append(len(pieces))
        elif lexeme["number"] and opened["("]:
            scale(opened["("].pop(), _number(lexeme["number"], prompt))
        elif closes and opened[closes]:
            scale(opened[closes].pop(), _FACTOR[closes])
        else:
            first, *others = _BREAK.split(text)
            pieces.append((first, 1.0))
            for other in others:
                pieces += [("BREAK", -1.0), (other, 1.0)]
    for bracket, starts in opened.items():
        for start in starts:
            scale(start, _FACTOR[bracket])
    return _join(pieces or [("", 1.0)])


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise PromptError(f"{text!r} is not a number, in ':{text})' of the prompt {prompt!r}; write a weight as in (word:1.2)") from error


def _join(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined = pieces[:1]
    for text, weight in pieces[1:]:
        if weight == joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def encode_weighted(tokenizer: Tokenizer, prompt: str, negative: str | None) -> tuple[WeightedTokens, WeightedTokens]:
    """Both prompts, parsed and brought to the same number of tokens; the shorter one is filled with eos of weight 1.

    `tokenizer` is SDXL's first; both text encoders take its ids. A `negative` of None counts as "". Weights are rounded to
    float16, the precision that the published pipeline gives them. Raises `PromptError` for weights beyond float16.
    """
    both = [_tokens(tokenizer, text) for text in (prompt, negative or "")]
    longest = max(len(ids) for ids, _ in both)
    filled = [(ids + [tokenizer.eos_id] * (longest - len(ids)), weights + [1.0] * (longest - len(ids))) for ids, weights in both]
    positive, other = (_group(tokenizer, ids, weights) for ids, weights in filled)
    return positive, other


def _tokens(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(prompt):
        if abs(weight) > float(np.finfo(np.float16).max):
            raise PromptError(f"the weight {weight:g} of {text!r} is too large; weights are usually between 0 and 2")
        piece = tokenizer.encode_unbounded(text)
        ids += piece
        weights += [float(np.float16(weight))] * len(piece)
    return ids, weights


def _group(tokenizer: Tokenizer, ids: list[int], weights: list[float]) -> WeightedTokens:
    room = tokenizer.length - 2
    groups = len(ids) // room + 1
    out = WeightedTokens(
        ids=np.full((groups, tokenizer.length), tokenizer.eos_id, np.int32),
        weights=np.ones((groups, tokenizer.length), np.float32),
        lengths=np.zeros(groups, np.int32),
    )
    out.ids[:, 0] = tokenizer.bos_id
    for g in range(groups):
        part = slice(g * room, (g + 1) * room)
        n = len(ids[part])
        out.ids[g, 1 : n + 1] = ids[part]
        out.weights[g, 1 : n + 1] = weights[part]
        out.lengths[g] = n + 2
    return out


def apply_weights(states: ArrayLike, weights: ArrayLike, lengths: ArrayLike) -> jax.Array:
    """Equation (1) for every group, in float32.

    Args: encoder states [g, n, c], weights [g, n], lengths int [g]. Positions from `lengths` on are left as they are.
    """
    states = jnp.asarray(states, jnp.float32)
    w = jnp.asarray(weights, jnp.float32)[..., None]
    last = jnp.take_along_axis(states, (jnp.asarray(lengths) - 1)[:, None, None], axis=1)
    return jnp.where(w == 1, states, last + (states - last) * w)


def flatten_groups(states: jax.Array, lengths: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The groups in a row, [g, n, c] -> [g*n, c], and which positions count, bool [g*n]."""
    g, n, c = states.shape
    mask = jnp.arange(n) < jnp.asarray(lengths)[:, None]
    return states.reshape(g * n, c), mask.reshape(g * n)
