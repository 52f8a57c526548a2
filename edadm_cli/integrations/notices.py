"""Shows notices of a loaded export: one line on stderr, once per process."""

from __future__ import annotations

_said: set[str] = set()


def say_once(message: str) -> None:
    """Logs a warning through diffusers' logger, so that diffusers' verbosity applies."""
    if message in _said:
        return
    from diffusers.utils import logging

    logger = logging.get_logger("diffusers.quantizers.edadm")
    if logger.isEnabledFor(logging.WARNING):  # the verbosity may be raised later
        _said.add(message)
        logger.warning(message)
