"""Memory that a model has used and needs no more: given back to the system, where its C library is glibc."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt(3)."""
LARGE_BYTES = 16 << 20
"""Above what the layers of a small model work with: to get such a block from the system anew takes as long as to fill it."""


def give_back_large_blocks() -> None:
    """Give blocks of LARGE_BYTES or more back as soon as they are free. By itself glibc keeps ever larger ones, and this process grows."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_now() -> None:
    """Give back what is free now: after a model has gone, or while nothing is asked of it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
