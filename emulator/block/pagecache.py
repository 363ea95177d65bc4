"""Whether the host's page cache holds any page of a file: mincore(2) on a mapping of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

_WINDOW: Final = 1 << 30
"""Bytes mapped at once; the answer of mincore has a byte a page."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_libc.mincore.restype = ctypes.c_int


def resident(fd: int) -> bool:
    """Whether a page of the file is cached. Blocks; raises OSError."""
    size = os.fstat(fd).st_size
    return any(_resident(fd, start, min(_WINDOW, size - start)) for start in range(0, size, _WINDOW))


def _resident(fd: int, start: int, length: int) -> bool:
    pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    # A private writable mapping, because ctypes only tells the address of writable buffers; nothing is written.
    with mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start) as window:
        first = ctypes.c_char.from_buffer(window)
        try:
            if _libc.mincore(ctypes.addressof(first), length, pages):
                number = ctypes.get_errno() or errno.EIO
                raise OSError(number, os.strerror(number))
        finally:
            del first  # it holds the mapping open
    return any(page & 1 for page in pages.raw)
