"""Making a file of the host: blockdev-create with driver ``file``.

An existing file is emptied first, as QEMU does, but only after everything that can be refused has been; one that another
process or node has locked is left alone. A file that this call made and could not finish is removed (QEMU leaves it).
Source: QEMU ``block/file-posix.c`` (raw_co_create), ``qapi/block-core.json`` (BlockdevCreateOptionsFile).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import suppress
from typing import Final

import msgspec

from livedisk.emulator.block.creation import BlockdevCreateOptions, taken
from livedisk.emulator.block.descriptors import PREFIX, open_file
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.imagelock import give_up
from livedisk.emulator.block.options import Size
from livedisk.emulator.block.types import Preallocation
from livedisk.emulator.drivers.file import FileOptions
from livedisk.emulator.errors import BlockError

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW_FL: Final = 0x00800000
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_EXTSIZE: Final = 0x800
_FSXATTR: Final = struct.Struct("=IIIII8x")


class BlockdevCreateOptionsFile(BlockdevCreateOptions, kw_only=True):
    """Sizes are bytes. ``extent_size_hint`` is for file systems that know it (XFS); 0: none."""

    filename: str
    size: Size
    preallocation: Preallocation = Preallocation.OFF
    nocow: bool = False
    extent_size_hint: Size | msgspec.UnsetType = msgspec.UNSET


async def create(graph: Graph, options: BlockdevCreateOptionsFile) -> None:
    """Make the file. Raises BlockError, in QEMU's words, or OSError."""
    if options.preallocation is Preallocation.METADATA:
        raise BlockError(f"Unsupported preallocation mode: {options.preallocation}")
    if options.size >= 1 << 63:
        raise BlockError(f"Could not resize file: {os.strerror(errno.EINVAL)}")
    path = options.filename
    made = _make(path, options)
    try:
        async with taken(graph, FileOptions(driver="file", filename=path)) as node:
            await node.truncate(0)
            _hint(path, options)
            await node.truncate(options.size, prealloc=options.preallocation)
    except BaseException:
        if made:
            with suppress(OSError):
                os.unlink(path)
        raise


def _make(path: str, options: BlockdevCreateOptionsFile) -> bool:
    """Have a file there. Returns whether there was none."""
    if path.startswith(PREFIX):
        fd, lease = open_file(path, os.O_RDWR | os.O_CREAT)
        give_up(fd, lease)
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BlockError(f"Could not create '{path}': {os.strerror(errno.EISDIR)}") from None
        if not stat.S_ISREG(mode):
            raise BlockError(f"Could not resize file: {os.strerror(errno.EINVAL)}") from None
        return False
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else str(error)
        raise BlockError(f"Could not create '{path}': {reason}") from None
    if options.nocow:
        set_nocow(fd)
    os.close(fd)
    return True


def set_nocow(fd: int) -> None:
    """Ask the file system not to copy on write (btrfs). Best effort: only some know the flag, and only on an empty file."""
    with suppress(OSError):
        raw = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
        (flags,) = struct.unpack("=q", raw)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=q", flags | _FS_NOCOW_FL))


def _hint(path: str, options: BlockdevCreateOptionsFile) -> None:
    """The hints that only an empty file takes. A file system that knows none of them is no error, as with QEMU."""
    fd, lease = open_file(path, os.O_RDWR)
    try:
        if options.nocow:
            set_nocow(fd)
        if isinstance(options.extent_size_hint, int) and options.extent_size_hint:
            with suppress(OSError):
                flags, _, *rest = _FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
                wanted = _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, options.extent_size_hint & 0xFFFF_FFFF, *rest)
                fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, wanted)
    finally:
        give_up(fd, lease)
