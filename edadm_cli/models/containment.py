"""What libraries must not do while they load a model: ask the user, and reach the network behind the user's back."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_questions() -> Iterator[None]:
    """Give libraries an empty standard input: a question about custom code gets no answer from a script."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


@contextmanager
def no_network() -> Iterator[None]:
    """Keep the client of the Hugging Face hub offline: the configuration of a local model cannot have files fetched."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
