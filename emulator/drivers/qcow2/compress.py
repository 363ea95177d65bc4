"""Compressed clusters: one cluster in, a shorter string out, and back within bounds.

zlib clusters are raw deflate streams with a window of 4 KiB, zstd clusters one frame. What is read is not trusted: no more than
a cluster is ever produced, and a stream that holds less or more than one is an error (QEMU takes a longer zlib stream; nobody
writes one). Both directions run in the I/O threads where a cluster is large. Source: QEMU ``docs/interop/qcow2.rst``,
"Compressed clusters", ``block/qcow2-threads.c``.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import OrderedDict
from typing import Any, Final

from livedisk.emulator.block.hostfile import in_thread
from livedisk.emulator.drivers.qcow2.header import Compression

Buffer = bytes | bytearray | memoryview

_WINDOW: Final = -12
"""Raw deflate, 4 KiB: what qcow2 prescribes."""
_INLINE: Final = 16 << 10
"""Bytes: smaller clusters are not worth a thread."""
CACHE_BYTES: Final = 1 << 20
"""Decompressed clusters kept, because a guest reads a compressed cluster in pieces (at least one cluster)."""


def _zstd() -> Any:
    """The zstd module: part of Python from 3.14 on, a package before."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd  # type: ignore[no-redef,unused-ignore]
    return zstd


def compress(kind: Compression, data: Buffer) -> bytes:
    """One cluster, compressed."""
    if kind is Compression.ZSTD:
        return bytes(_zstd().compress(data))
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW)
    return packer.compress(data) + packer.flush()


def decompress(kind: Compression, data: Buffer, size: int) -> bytes:
    """``size`` bytes out of a stream that something may follow. Raises EIO unless the stream holds exactly that much."""
    try:
        if kind is Compression.ZSTD:
            return _decompress_zstd(data, size)
        return _decompress_zlib(data, size)
    except Exception as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise _bad(str(error)) from error


def _decompress_zlib(data: Buffer, size: int) -> bytes:
    unpacker = zlib.decompressobj(_WINDOW)
    plain = unpacker.decompress(data, size)
    if len(plain) < size:
        raise _bad(f"it holds only {len(plain)} of {size} bytes")
    if not unpacker.eof and unpacker.decompress(unpacker.unconsumed_tail, 1):
        raise _bad(f"it holds more than {size} bytes")
    return plain


def _decompress_zstd(data: Buffer, size: int) -> bytes:
    unpacker = _zstd().ZstdDecompressor()
    plain = bytearray(unpacker.decompress(data, size))
    while len(plain) < size and not unpacker.eof and not unpacker.needs_input:
        plain += unpacker.decompress(b"", size - len(plain))
    if len(plain) < size:
        raise _bad(f"it holds only {len(plain)} of {size} bytes")
    if not unpacker.eof and not unpacker.needs_input and unpacker.decompress(b"", 1):
        raise _bad(f"it holds more than {size} bytes")
    return bytes(plain)


def _bad(why: str) -> OSError:
    return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: compressed cluster cannot be decompressed: {why}")


class Decompressor:
    """Decompresses clusters of one image and remembers the last few, by their L2 entry."""

    def __init__(self, kind: Compression, cluster_size: int) -> None:
        self.kind = kind
        self.cluster_size = cluster_size
        self._known: OrderedDict[int, bytes] = OrderedDict()
        self._limit = max(CACHE_BYTES // cluster_size, 1)

    def known(self, entry: int) -> bytes | None:
        """The plain cluster of an L2 entry, if it is remembered."""
        return self._known.get(entry)

    async def unpack(self, entry: int, data: Buffer) -> bytes:
        """The plain cluster of an L2 entry, whose compressed bytes are ``data``. Raises EIO."""
        if self.cluster_size <= _INLINE:
            plain = decompress(self.kind, data, self.cluster_size)
        else:
            plain = await in_thread(decompress, self.kind, data, self.cluster_size)
        self._known[entry] = plain
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return plain

    async def pack(self, data: Buffer) -> bytes:
        """A cluster, compressed; it may be longer than it was."""
        if self.cluster_size <= _INLINE:
            return compress(self.kind, data)
        return await in_thread(compress, self.kind, data)

    def forget(self) -> None:
        """A compressed cluster was dropped or written: its place may hold something else soon."""
        self._known.clear()
