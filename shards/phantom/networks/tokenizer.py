"""A tokenizer for the phantom's captions: every word is one token; the stock CLIPTokenizer reads the files.

Byte-pair merges are learned from the world's vocabulary until each word is whole, so unknown words still split into
letters. Nothing is downloaded.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from nd_dist.files import write_json, write_text
from shards.phantom.networks.architectures import MAX_TOKENS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

Symbols = tuple[str, ...]


@cache
def learn_merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return byte-pair merges, most frequent first (ties alphabetically), until every word is one token."""
    spelled: list[Symbols] = [(*word[:-1], word[-1] + WORD_END) for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(symbols, best) for symbols in spelled]
    return tuple(merges)


def _merged(symbols: Symbols, pair: tuple[str, str]) -> Symbols:
    """Return ``symbols`` with every neighbouring ``pair`` joined, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def write_tokenizer(folder: Path, words: tuple[str, ...]) -> CLIPTokenizer:
    """Write a tokenizer for these words in Hugging Face layout and return it as the stock class reads it.

    It pads and ends with ``<|endoftext|>``, whose id is the highest, as CLIP's pooling wants.
    """
    merges = learn_merges(words)
    letters = [*LETTERS, *(letter + WORD_END for letter in LETTERS)]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges), START, END])
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "special_tokens_map.json", special)
    fixed = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**special, **fixed})
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
