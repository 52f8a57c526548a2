"""Keeps messages of other libraries off the terminal, which is for the command's own output."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PIPELINES = "diffusers.pipelines"
_SAME_TEXT = 40  # characters that two warnings of one kind have in common; what follows are values


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps diffusers, transformers and huggingface_hub from writing to the terminal."""
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    hub_bars_were_on = not hub.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity(diffusers_logging.CRITICAL)
        library.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
        if hub_bars_were_on:
            hub.enable_progress_bars()


@contextmanager
def library_warnings(module: str) -> Iterator[list[str]]:
    """Collects the warnings of a module of diffusers while entered, each kind once; nothing is printed.

    Args:
        module: The module, such as `diffusers.pipelines`; those inside it belong to it.
    """
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if all(text[:_SAME_TEXT] != message[:_SAME_TEXT] for message in messages):
                messages.append(text)

    logger, handler = logging.getLogger(module), Collector(logging.WARNING)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
