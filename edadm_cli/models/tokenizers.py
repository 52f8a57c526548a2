"""Tokenizers that can be built without a download."""

from __future__ import annotations

import gzip
import string
from functools import cache
from pathlib import Path
from typing import Any

_NUM_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: bytes, bytes that end a word, merges, start and end
_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer(**options: Any) -> Any:
    """Returns CLIP's own tokenizer, from the merges that open_clip ships.

    Args:
        options: Further arguments of `transformers.CLIPTokenizer`, such as the padding token.

    References:
        CLIP, arXiv 2103.00020.
    """
    from transformers import CLIPTokenizer

    merges = _clip_merges()
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols), *("".join(pair) for pair in merges), *_SPECIAL]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), **options)


def letter_tokenizer(**options: Any) -> Any:
    """Returns a T5 tokenizer whose tokens are single characters: T5's own vocabulary has to be downloaded.

    It serves text encoders with random weights, which only need different tokens for different words.
    """
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    characters = [(character, -3.0) for character in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=[*special, *characters], extra_ids=0, **options)


def byte_tokenizer(**options: Any) -> Any:
    """Returns a Qwen tokenizer whose tokens are single bytes, with a chat template: Qwen's own has to be downloaded."""
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS]
    vocabulary = {symbol: number for number, symbol in enumerate([*_byte_symbols(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:], **options)
    tokenizer.chat_template = _CHAT
    return tokenizer


@cache
def _clip_merges() -> tuple[tuple[str, str], ...]:
    import open_clip

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _NUM_MERGES]
    return tuple((first, second) for first, second in (line.split() for line in lines))


def _byte_symbols() -> list[str]:
    """Returns the printable stand-ins of the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
