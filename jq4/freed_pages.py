"""Pages that are held no more, given back to the system: freed memory, and mapped files that were read.

glibc keeps what is freed in blocks of up to 32 MB for its next blocks: a program's compilation and its work space, the
activations of a unit of rows. Between the programs of a block of 7B that came to a fifth of the model's own bytes, and
to half of them after all were compiled. Elsewhere the allocator is left alone.

What JAX traced and compiled from lies in cycles, which Python collects when it has made enough of them: that came to a
seventh of a block of 7B in float32. Looking for it takes tenths of a second, so it is done where blocks are large.
"""

import contextlib
import ctypes
import functools
import gc
import mmap
import sys
from collections.abc import Callable
from typing import Any

import jax

_LARGE = 2**27  # bytes of a block


def give_back_freed_pages(block: Any = None) -> None:
    """Costs milliseconds; to be called between programs, not in loops over rows.

    Given a block that is large, what nothing refers to but itself is freed before: that costs tenths of a second.
    """
    if sum(leaf.nbytes for leaf in jax.tree.leaves(block)) >= _LARGE:
        gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


def give_back_mapped_pages(array: Any) -> None:
    """Of an array that views a mapped file (np.memmap): what was read is read again where it is needed again."""
    found = getattr(array, "_mmap", None)
    if isinstance(found, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError, ValueError):  # advice, no more
            found.madvise(mmap.MADV_DONTNEED)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where that is the allocator."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
