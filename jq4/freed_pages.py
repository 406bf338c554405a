"""Pages that are held no more, given back to the system: freed memory, and mapped files that were read.

glibc keeps what is freed in blocks of up to 32 MB for its next blocks: a program's compilation and its work space, the
activations of a unit of rows. Between the programs of a block of 7B that came to a fifth of the model's own bytes, and
to half of them after all were compiled. Elsewhere the allocator is left alone.
"""

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any


def give_back_freed_pages() -> None:
    """Costs milliseconds; to be called between programs, not in loops over rows."""
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
