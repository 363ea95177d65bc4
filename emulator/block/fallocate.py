"""Linux calls on host files that Python has no word for: fallocate with a mode, sync_file_range, and block
device ioctls.

All of them block: call them in a thread. Lengths and offsets are bytes; failures are `OSError`. Sources: fallocate(2),
``linux/falloc.h``, ``linux/fs.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

_SYNC_WRITE: Final = 2

_BLKGETSIZE64: Final = 0x80081272
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F

_libc = ctypes.CDLL(None, use_errno=True)
# fallocate64 takes 64-bit offsets whatever the platform's off_t is; musl only knows fallocate, 64-bit everywhere.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Mode 0 allocates, and grows the file if the range passes its end."""
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:  # a signal came; nothing was refused
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the range; it reads as zeroes. The file's size stays."""
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes without freeing it; grows the file if the range passes its end."""
    fallocate(fd, ZERO_RANGE, offset, length)


_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_sync_file_range.restype = ctypes.c_int


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have what the page cache holds of the range written now rather than at the next flush, which will find less to do. A hint:
    it makes nothing durable, and errors are left for the flush to tell (sync_file_range(2), SYNC_FILE_RANGE_WRITE)."""
    _sync_file_range(fd, offset, length, _SYNC_WRITE)


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    answer: int = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    return answer


def device_sector(fd: int) -> int:
    """Bytes of a block device's logical sector."""
    answer: int = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    return answer


def device_discard(fd: int, offset: int, length: int) -> None:
    """Tell a block device that the range's content is no longer needed."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def device_zero(fd: int, offset: int, length: int) -> None:
    """Zero a range of a block device."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
