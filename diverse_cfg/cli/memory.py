"""Let the C library keep the memory that tensors free."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Reuse freed blocks of up to 1 GiB, and keep up to 2 GiB that are free, where the C library is glibc.

    By itself it gives large blocks back at once, and the kernel clears every page again for the next tensor.
    `MALLOC_…` variables of the user stay in force.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 2**30)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
