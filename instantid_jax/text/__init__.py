"""Prompts: alternatives and styles; to token ids by CLIP's tokenizer, prompt weighting, prompts beyond 77 tokens."""

from instantid_jax.text.alternatives import AlternativeError, Combination, expand, literal
from instantid_jax.text.styles import Style, StyleError, find_style, packaged_styles, read_styles
from instantid_jax.text.tokenizer import Tokenizer, TokenizerError, TokenizerWarning
from instantid_jax.text.vocabulary import write_default_tokenizers
from instantid_jax.text.weighting import PromptError, WeightedTokens, apply_weights, encode_weighted, flatten_groups, parse

__all__ = [
    "AlternativeError",
    "Combination",
    "PromptError",
    "Style",
    "StyleError",
    "Tokenizer",
    "TokenizerError",
    "TokenizerWarning",
    "WeightedTokens",
    "apply_weights",
    "encode_weighted",
    "expand",
    "find_style",
    "flatten_groups",
    "literal",
    "packaged_styles",
    "parse",
    "read_styles",
    "write_default_tokenizers",
]
