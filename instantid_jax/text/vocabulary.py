"""CLIP's byte-pair vocabulary, from one small file.

Both SDXL tokenizers share OpenAI CLIP's vocabulary of 49,408 tokens and differ in the padding token alone. All of it
follows from the ordered list of merges:

    ids      0 ..   255   the 256 byte symbols
    ids    256 ..   511   the same at the end of a word (suffix ``</w>``)
    ids    512 .. 49405   the two halves of each merge, joined, in merge order
    ids  49406,   49407   ``<|startoftext|>``, ``<|endoftext|>``

so the package carries the merges only, compressed. ``write_default_tokenizers`` writes them out as the ordinary folders
that a published SDXL snapshot has.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

__all__ = ["BOS", "EOS", "byte_symbols", "default_merges", "vocabulary", "write_default_tokenizers"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGES = Path(__file__).parent.parent / "assets" / "tokenizer" / "merges.txt.gz"
_PADS = {"tokenizer": EOS, "tokenizer_2": "!"}


def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes, in the order of CLIP's ids 0..255.

    Bytes that Latin-1 prints stand for themselves and come first; the others follow, as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def default_merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 merges, in order of precedence."""
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id for the given merges, laid out as the module says."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(left + right for left, right in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}


def write_default_tokenizers(directory: str | Path, size: int | None = None) -> None:
    """Writes ``tokenizer/`` and ``tokenizer_2/`` under `directory`, each with the four files of a published snapshot.

    `size` is the number of tokens, for small models: the first merges only, so that rarer words fall into more pieces.
    """
    merges = default_merges()
    if size is not None:
        if not 514 <= size <= len(merges) + 514:
            raise ValueError(f"a CLIP vocabulary has 514 to {len(merges) + 514} tokens, not {size}")
        merges = merges[: size - 514]
    vocab = json.dumps(vocabulary(merges), ensure_ascii=False, separators=(",", ":"))
    for name, pad in _PADS.items():
        folder = Path(directory) / name
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
        files = {
            "vocab.json": vocab,
            "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
            "special_tokens_map.json": json.dumps(special, indent=1),
            "tokenizer_config.json": json.dumps({**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}, indent=1),
        }
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
