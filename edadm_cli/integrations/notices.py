"""What a loaded export has to say to whoever runs it: one line on stderr, once per process."""

from __future__ import annotations

_said: set[str] = set()


def say_once(message: str) -> None:
    """Logs a warning of diffusers, in whose name the export was loaded and whose verbosity is respected."""
    if message in _said:
        return
    from diffusers.utils import logging

    logger = logging.get_logger("diffusers.quantizers.edadm")
    if logger.isEnabledFor(logging.WARNING):  # a silenced process may be made audible later
        _said.add(message)
        logger.warning(message)
