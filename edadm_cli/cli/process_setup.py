"""Settings that a process makes before it imports libraries: what they may print, and how freed memory is kept."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def share_gpu_memory() -> None:
    """Lets a GPU's memory that tensors of one size gave back serve tensors of another; called before torch starts."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> None:
    """Lets the process reuse the memory of freed tensors instead of returning each to the system.

    glibc gives a large block back as soon as it is freed, and the system has to clear every page of the next one. With
    this call, blocks of up to 64 MiB (32 MiB before glibc 2.35, which takes no larger number) come from memory that the
    process has, of which it keeps up to 256 MiB. Settings of the user's environment take precedence, and other C
    libraries are left as they are.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # Windows, macOS and musl have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # the second number alone would fix the first one at its initial 128 KiB
        if mallopt(_M_MMAP_THRESHOLD, 64 << 20) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
            mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def silence_libraries(verbose: bool) -> None:
    """Silences libraries on stderr; it has to be called before they are imported."""
    if verbose:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # applies to the processes that a stage starts
    # matplotlib warns of a home folder that cannot be written, and torch of how torchao registers its types
    for name in ("matplotlib", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
