"""Builds the small CLIP tokenizer of the emoji models, whose byte pairs are learned from the training captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from edadm_cli.models.digits.train.tokenizer import END, START, byte_symbols
from edadm_cli.models.emoji.captions import MAX_TOKENS

VOCABULARY = 3328
_WORD_END = "</w>"


def build_tokenizer(captions: Iterable[Iterable[str]]) -> CLIPTokenizer:
    """Builds the tokenizer of 512 byte symbols, learned merges, a start and an end token: at most 3,328 tokens."""
    words = Counter(word for group in captions for caption in group for word in re.findall("[a-z]+", caption))
    symbols = byte_symbols()
    alphabet = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
    merges = _learn_merges(words, VOCABULARY - len(alphabet) - 2)
    tokens = [*alphabet, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _learn_merges(words: Counter[str], most: int) -> list[tuple[str, str]]:
    """Returns at most `most` byte-pair merges, the most frequent first; words that occur only once count too."""
    trainer = BpeTrainer(vocab_size=most + 26 * 2, end_of_word_suffix=_WORD_END, show_progress=False, min_frequency=1)
    tokenizer = Tokenizer(BPE(end_of_word_suffix=_WORD_END))
    ordered = (word for word, count in sorted(words.items()) for _ in range(count))
    tokenizer.train_from_iterator(ordered, trainer)
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges][:most]
