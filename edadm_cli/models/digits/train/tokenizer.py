"""Builds the small CLIP tokenizer of `digits-sd`, which has tokens for bytes and one token per word of the captions."""

from __future__ import annotations

import re

from transformers import CLIPTokenizer

from edadm_cli.models.digits.data import captions_of

MAX_LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """Returns the printable characters that stand for the 256 bytes, in CLIP's order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(code) for code in (*printable, *range(256, 256 + 256 - len(printable)))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Returns byte-pair merges that make each word one token.

    The merges so far are applied to a word first. What is left is then merged from the left. Later merges have a lower
    rank, so they never change how an earlier word is split.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + _WORD_END]
        for pair in merges:
            parts = _merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merge(parts, merges[-1])
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """Builds the tokenizer of 512 byte symbols, the merged words of the captions, a start token and an end token."""
    words = sorted({word for digit in range(10) for text in captions_of(digit) for word in re.findall("[a-z]+", text)})
    merges = learn_merges(words)
    symbols = byte_symbols()
    tokens = [
        *symbols,
        *(symbol + _WORD_END for symbol in symbols),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )
