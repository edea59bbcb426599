"""Prompts to token ids: CLIP's tokenizer, prompt weighting, prompts beyond 77 tokens."""

from instantid_jax.text.tokenizer import Tokenizer, TokenizerError, TokenizerWarning
from instantid_jax.text.vocabulary import write_default_tokenizers
from instantid_jax.text.weighting import PromptError, WeightedTokens, apply_weights, encode_weighted, flatten_groups, parse

__all__ = [
    "PromptError",
    "Tokenizer",
    "TokenizerError",
    "TokenizerWarning",
    "WeightedTokens",
    "apply_weights",
    "encode_weighted",
    "flatten_groups",
    "parse",
    "write_default_tokenizers",
]
