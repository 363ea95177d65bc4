"""nbd: an export of an NBD server as a node.

Requests are cut to what the server takes (maximum payload, minimum block size: what is not whole blocks is read, changed and
written), and sent over a `Link`, which holds them through an outage. What the server did not say it can do is not asked of it:
without FLUSH every write is taken to be durable, without TRIM a discard does nothing, without WRITE_ZEROES the node writes
zeroes, without FAST_ZERO a caller that wants zeroes only if that is quick is told that it is not.

* The size is the one at open. It is rounded up to whole sectors; what that adds reads as zeroes.
* A server that comes back with a smaller export, or a read-only one where we write, is not accepted: the outage goes on.
  A larger one is, and its additional bytes are not used.
* The node is a yank instance while it is open: yank cuts its connections for good.

Source: QEMU ``block/nbd.c``; messages are QEMU's where it has one that says what is wrong. Where we differ: a read-only server
under a node that may not be read-only is refused in words, not with "Permission denied"; reconnecting is checked for the size;
see also `livedisk.nbd.client_link`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from livedisk.emulator.block.driver import Driver, Ended, register
from livedisk.emulator.block.extents import Extents as HostExtents
from livedisk.emulator.block.extents import SourceUnreadable, write_through_memory
from livedisk.emulator.block.sockets import InetAddress, VsockAddress, connect, shown
from livedisk.emulator.block.status import BlockStatus, Status
from livedisk.emulator.block.types import SECTOR, Kind, Preallocation, Segment, ZeroFlags, whole_sectors
from livedisk.emulator.drivers.nbd import names
from livedisk.emulator.drivers.nbd.extents import Extents
from livedisk.emulator.drivers.nbd.options import NbdOptions
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp import yank
from livedisk.nbd.client_connection import ClientConnection, Secure, open_connection
from livedisk.nbd.client_handshake import ExportInfo, NegotiationFailed
from livedisk.nbd.client_link import Link, State
from livedisk.nbd.client_transmission import NO_FLAGS
from livedisk.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    MAX_STRING,
    STATE_HOLE,
    STATE_ZERO,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from livedisk.nbd.file_payload import FilePayload

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node

log = logging.getLogger(__name__)

_ZERO_STEP: Final = 64 << 20
"""Bytes zeroed by one request: a server may have to write them."""
_TRIM_STEP: Final = 1 << 30
"""Bytes discarded by one request; the protocol's lengths have 32 bits."""
_FILE_STEP: Final = 1 << 20
"""Bytes of a request whose payload stands in a file: a server works on one while the next arrives, in its processor's cache."""
_FILES: Final = 4
"""Copies from files under way at once, 4 MiB each: as much as jobs have under way through memory. A server may hold it all."""
_FLUSH_EVERY: Final = 64 << 20
"""Bytes of long writes after which the server begins to put them on stable storage."""
_LONG: Final = 1 << 20
"""Bytes of a write that is long."""
_KIND: Final = "block-node"


class NbdDriver(Driver):
    """An export."""

    name = "nbd"
    Options = NbdOptions
    protocols = names.PROTOCOLS
    options: NbdOptions

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        export = options.export if isinstance(options.export, str) else ""
        self._export = export
        self._where = f"NBD server '{shown(options.server)}', export '{export}'"
        context = options.x_dirty_bitmap
        self._context = context if isinstance(context, str) else BASE_ALLOCATION
        self._link = Link(self._connect, self._check, reconnect_delay=options.reconnect_delay, where=self._where)
        self._copies = asyncio.Semaphore(_FILES)
        self._unflushed = False
        self._long_bytes = 0
        self._early: asyncio.Task[None] | None = None
        self._early_failure: OSError | None = None
        self._size = self._told_size = 0  # not known before `open` is done, and others may look

    @classmethod
    def options_of(cls, filename: str) -> NbdOptions:
        """The options that a name with one of ``protocols`` means."""
        return names.parse(filename)

    # -- life --------------------------------------------------------------------------------------------------------
    async def open(self) -> None:
        options = self.options
        if len(self._export.encode()) > MAX_STRING:
            raise BlockError("export name too long to send to server")
        if len(self._context.encode()) > MAX_STRING:
            raise BlockError("x-dirty-bitmap query too long to send to server")
        if isinstance(options.server, VsockAddress):
            raise BlockError("vsock addresses are not supported", hint="Use an inet or unix address, or fd.")
        self._secure = self._tls()
        yank.register(_KIND, self.node.name, self._link.cut)
        try:
            await self._open_link()
        except BaseException:
            yank.unregister(_KIND, self.node.name)
            raise

    async def _open_link(self) -> None:
        try:
            await self._link.open(self.options.open_timeout)
        except NegotiationFailed as error:
            hints = filter(None, (error.hint, f"Tried: {self._where}"))
            raise BlockError(str(error), hint="\n".join(hints)) from error
        except OSError as error:
            raise BlockError(error.strerror or str(error), hint=f"Tried: {self._where}") from error
        try:
            self._adopt(self._link.info)
        except BaseException:
            await self._link.close()
            raise

    def _tls(self) -> Secure | None:
        """What does TLS on a new connection, or None. Raises BlockError for unknown or unfit credentials."""
        creds = self.options.tls_creds
        if not isinstance(creds, str):
            return None
        make = self.node.graph.client_tls
        if make is None:
            raise BlockError(f"No TLS credentials with id '{creds}'")
        server, hostname = self.options.server, self.options.tls_hostname
        if isinstance(hostname, str):
            return make(creds, hostname)
        return make(creds, server.host if isinstance(server, InetAddress) else None)

    async def _connect(self) -> ClientConnection:
        sock = await connect(self.options.server)
        # TCP makes small packets of what stands in files: there, reading and sending is faster (measured on loopback).
        self.copies_in = self._secure is None and sock.family == socket.AF_UNIX
        return await open_connection(sock, self._export, contexts=(self._context,), secure=self._secure)

    def _adopt(self, info: ExportInfo) -> None:
        """Take over what the server says of the export at open."""
        node = self.node
        if info.flags & TransmissionFlag.READ_ONLY and not node.read_only:
            if not node.auto_read_only:
                raise BlockError(
                    f"NBD export is read-only: {self._where}", hint="Open it with read-only=on or auto-read-only=on."
                )
            node.read_only = True
        self._told_size = info.size
        self._size = whole_sectors(info.size)
        # A server that does not say so takes whole sectors, unless its export has none (proto.md, "Block size constraints").
        self.request_alignment = info.min_block if info.sized else 1 if info.size % SECTOR else SECTOR
        self._longest = min(info.max_payload, MAX_PAYLOAD) // self.request_alignment * self.request_alignment
        self._extents = Extents(self._link, self._context, self.request_alignment)
        if self.options.x_dirty_bitmap is not msgspec.UNSET and not self._extents.known:
            raise BlockError(f"requested x-dirty-bitmap {self._context} not found")

    def _check(self, info: ExportInfo) -> None:
        """Whether an export can take the place of the one that was opened."""
        if info.size < self._told_size:
            raise NegotiationFailed(f"the export now has {info.size} bytes, not {self._told_size} as before")
        if info.flags & TransmissionFlag.READ_ONLY and not self.node.read_only:
            raise NegotiationFailed("the export is read-only now")
        if info.sized and (info.min_block > self.request_alignment or info.max_payload < self._longest):
            raise NegotiationFailed("the export now has other block sizes")

    async def close(self) -> None:
        """What was written is on the server's stable storage, if there still is a server; nobody waits here for one to come
        back, and that what was written since the last flush may be lost is only logged: a node whose server is gone for good
        must be possible to close. Raises what the server says to the flush."""
        self._link.no_more_holding()
        if self._early is not None:
            await asyncio.wait([self._early])
        try:
            if self._unflushed or self._early_failure is not None:
                await self.flush()
        except OSError as error:
            if self._link.state is State.CONNECTED:
                raise
            log.warning("%s: what was written since the last flush may be lost: %s", self._where, error.strerror)
        finally:
            yank.unregister(_KIND, self.node.name)
            await self._link.close()

    def way_out(self) -> str:
        name = self.node.name
        return f'yank with {{"instances": [{{"type": "{_KIND}", "node-name": "{name}"}}]}} cuts the connection: they fail then'

    def give_up(self) -> bool:
        self._link.drop("the server gives no answer")
        return True

    def cancel_in_flight(self) -> None:
        self._link.stop_holding()

    # -- where -------------------------------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return names.compose(self.options)

    def exact_filename(self, children: Mapping[str, str], strong: Collection[str]) -> str:
        """QEMU gives an export its URI whatever it was opened with."""
        return self.filename

    def map(self, offset: int, length: int) -> Segment:
        return Segment(Kind.OPAQUE, length)

    async def status(self, offset: int, length: int) -> BlockStatus:
        node, told = self.node, self._told_size
        valid = Status.ALLOCATED | Status.OFFSET_VALID
        if offset >= told:
            return BlockStatus(Status.ZERO | Status.ALLOCATED, length, 1, node)
        length = min(length, told - offset)
        if not self._extents.known:
            return BlockStatus(valid | Status.DATA, length, 1, node, node, offset)
        flags, run = await self._aligned_status(offset, length)
        if self._context == ALLOCATION_DEPTH:
            flags = min(flags, 2)
        found = Status.NONE if flags & STATE_HOLE else Status.DATA
        found |= Status.ZERO if flags & STATE_ZERO else Status.NONE
        if not found and self._context != BASE_ALLOCATION:
            return BlockStatus(Status.NONE, run, 1, node)  # as QEMU shows what is dirty
        return BlockStatus(valid | found, run, 1, node, node, offset)

    async def _aligned_status(self, offset: int, length: int) -> tuple[int, int]:
        block = self.request_alignment
        start = offset // block * block
        stop = min(-(-(offset + length) // block) * block, self._told_size)
        flags, run = await self._extents.at(start, stop - start, self._told_size)
        return flags, min(start + run - offset, length)

    # -- reading -----------------------------------------------------------------------------------------------------
    async def read(self, offset: int, view: memoryview) -> None:
        length = len(view)
        if offset + length > self._told_size:
            inside = max(self._told_size - offset, 0)
            view[inside:] = bytes(length - inside)
            view, length = view[:inside], inside
        if (offset | length) % self.request_alignment:
            await self._read_blocks(offset, view)
        elif length <= self._longest:
            if length:
                await self._link.request(Command.READ, offset, length, target=view)
        else:
            for start in range(0, length, self._longest):
                part = view[start : start + self._longest]
                await self._link.request(Command.READ, offset + start, len(part), target=part)

    def start_read(self, offset: int, view: memoryview, ended: Ended) -> bool:
        length = len(view)
        if not self._fits(offset, length):
            return False
        return self._link.start(Command.READ, offset, length, ended, target=view)

    def _fits(self, offset: int, length: int) -> bool:
        """Whether a range can go to the server as one request, as it is."""
        inside = offset + length <= self._told_size and 0 < length <= self._longest
        return inside and not (offset | length) % self.request_alignment

    async def _read_blocks(self, offset: int, view: memoryview) -> None:
        """Read whole blocks around what is not."""
        block, end = self.request_alignment, offset + len(view)
        start = offset // block * block
        around = memoryview(bytearray(-(-end // block) * block - start))
        await self.read(start, around)
        view[:] = around[offset - start : end - start]

    # -- writing -----------------------------------------------------------------------------------------------------
    async def write(self, offset: int, data: memoryview) -> None:
        await self._write(offset, data, NO_FLAGS)

    @property
    def writes_durably(self) -> bool:
        return bool(self._link.info.flags & TransmissionFlag.SEND_FUA)

    async def write_durably(self, offset: int, data: memoryview) -> None:
        await self._write(offset, data, CommandFlag.FUA)

    async def _write(self, offset: int, data: memoryview, flags: CommandFlag) -> None:
        length = len(data)
        if offset + length > self._told_size:
            data = data[: self._inside(offset, data)]
            length = len(data)
        if (offset | length) % self.request_alignment:
            await self._write_blocks(offset, data, flags)
            return
        self._changing()
        self._flush_soon(length)
        try:
            for start in range(0, length, self._longest):
                part = data[start : start + self._longest] if length > self._longest else data
                await self._link.request(Command.WRITE, offset + start, len(part), flags=flags, payload=part)
        finally:
            self._extents.forget()

    async def copy_in(self, offset: int, extents: HostExtents) -> None:
        length = len(extents)
        inside = offset + length <= self._told_size and not (offset | length) % self.request_alignment
        if not inside or not await extents.warm():
            await write_through_memory(extents, offset, self.write)
            return
        step = min(_FILE_STEP, self._longest)
        async with self._copies:
            self._changing()
            self._flush_soon(length)
            try:
                # All of them end before this does: until then the bytes must stay where they are.
                ends = await asyncio.gather(
                    *(self._write_file(offset + at, extents[at : at + step]) for at in range(0, length, step)),
                    return_exceptions=True,
                )
            finally:
                self._extents.forget()
        for end in ends:
            if end is not None:
                raise end

    async def _write_file(self, offset: int, extents: HostExtents) -> None:
        payload = FilePayload([(-1 if file is None else file.fd, at, length) for file, at, length in extents.parts])
        await self._link.request(Command.WRITE, offset, len(payload), payload=payload)
        if payload.error is not None:
            raise SourceUnreadable(payload.error.errno, payload.error.strerror)

    def start_write(self, offset: int, data: memoryview, ended: Ended) -> bool:
        if not self._fits(offset, len(data)):
            return False

        def finish(error: OSError | None, holes: Sequence[tuple[int, int]]) -> None:
            self._extents.forget()
            ended(error, holes)

        self._changing()
        return self._link.start(Command.WRITE, offset, len(data), finish, payload=data)

    def _changing(self) -> None:
        self._unflushed = True

    def _inside(self, offset: int, data: memoryview) -> int:
        """Bytes of ``data`` that lie in the export. Only zeroes may lie behind: they are what is read there."""
        inside = max(self._told_size - offset, 0)
        if any(data[inside:]):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {self._where} ends at {self._told_size}")
        return inside

    async def _write_blocks(self, offset: int, data: memoryview, flags: CommandFlag) -> None:
        """Read the blocks around, change them, write them; the node keeps others off them."""
        block, end = self.request_alignment, offset + len(data)
        start, stop = offset // block * block, -(-end // block) * block
        around = memoryview(bytearray(stop - start))
        await self.read(start, around[:block])
        if stop - start > block:
            await self.read(stop - block, around[-block:])
        around[offset - start : end - start] = data
        await self._write(start, around, flags)

    async def write_zeroes(self, offset: int, length: int, flags: ZeroFlags) -> None:
        server = self._link.info.flags
        fast = bool(flags & ZeroFlags.NO_FALLBACK)
        length = min(length, self._told_size - offset)
        if not server & TransmissionFlag.SEND_WRITE_ZEROES or (fast and not server & TransmissionFlag.SEND_FAST_ZERO):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        wire = NO_FLAGS if flags & ZeroFlags.MAY_UNMAP else CommandFlag.NO_HOLE
        if fast:
            wire |= CommandFlag.FAST_ZERO
        block = self.request_alignment
        if length > 0 and (offset | length) % block:
            if fast:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            await self._zero_unaligned(offset, length, wire)
        elif length > 0:
            await self._ranges(Command.WRITE_ZEROES, offset, length, _ZERO_STEP, wire)

    async def _zero_unaligned(self, offset: int, length: int, wire: CommandFlag) -> None:
        block, end = self.request_alignment, offset + length
        first, last = -(-offset // block) * block, end // block * block
        if first > last:
            first = last = end
        if first > offset:
            await self._write(offset, memoryview(bytes(first - offset)), NO_FLAGS)
        if last > first:
            await self._ranges(Command.WRITE_ZEROES, first, last - first, _ZERO_STEP, wire)
        if end > last:
            await self._write(last, memoryview(bytes(end - last)), NO_FLAGS)

    async def discard(self, offset: int, length: int) -> None:
        if not self._link.info.flags & TransmissionFlag.SEND_TRIM:
            return
        block = self.request_alignment
        first, last = -(-offset // block) * block, min(offset + length, self._told_size) // block * block
        if last > first:
            await self._ranges(Command.TRIM, first, last - first, _TRIM_STEP, NO_FLAGS)

    async def _ranges(self, command: Command, offset: int, length: int, step: int, wire: CommandFlag) -> None:
        self._changing()
        try:
            for start in range(offset, offset + length, step):
                await self._link.request(command, start, min(step, offset + length - start), flags=wire)
        finally:
            self._extents.forget()

    async def flush(self) -> None:
        if not self._link.info.flags & TransmissionFlag.SEND_FLUSH:
            self._unflushed = False
            return
        await self._flush_now()
        if self._early_failure is not None:
            failure, self._early_failure = self._early_failure, None
            raise failure

    async def _flush_now(self) -> None:
        before, self._unflushed = self._unflushed, False
        try:
            await self._link.request(Command.FLUSH, 0, 0)
        except BaseException:
            self._unflushed = before or self._unflushed
            raise

    def _flush_soon(self, length: int) -> None:
        """Count a write. After much of long ones, which jobs make, let the server begin to put them on stable storage: the flush
        at the job's end, for which a guest may be held, then has little left to do."""
        if length < _LONG:
            return
        self._long_bytes += length
        can = self._link.info.flags & TransmissionFlag.SEND_FLUSH
        if can and self._long_bytes >= _FLUSH_EVERY and self._early is None:
            self._long_bytes = 0
            self._early = asyncio.get_running_loop().create_task(self._flush_early())

    async def _flush_early(self) -> None:
        try:
            await self._flush_now()
        except OSError as error:
            if self._link.state is State.CONNECTED:
                self._early_failure = error  # whoever asks for a flush is told: the server may not say it twice
        finally:
            self._early = None

    async def prefetch(self, offset: int, length: int) -> None:
        if not self._link.info.flags & TransmissionFlag.SEND_CACHE:
            return
        block = self.request_alignment
        first, last = offset // block * block, min(-(-(offset + length) // block) * block, self._told_size)
        for start in range(first, last, self._longest):
            await self._link.request(Command.CACHE, start, min(self._longest, last - start))

    # -- the rest ----------------------------------------------------------------------------------------------------
    async def truncate(self, size: int, *, exact: bool, prealloc: Preallocation) -> None:
        """The size is the server's. One that is not asked for exactly may be larger."""
        if exact and size != self._told_size:
            raise BlockError("Cannot resize NBD nodes")
        if size > self._told_size:
            raise BlockError("Cannot grow NBD nodes")

    async def reopen_prepare(self, options: Any, *, read_only: bool) -> None:
        if not read_only and self._link.info.flags & TransmissionFlag.READ_ONLY:
            raise BlockError("Can't reopen read-only NBD mount as read/write")
        self.check_unchanged(options)

    def dirty_flag(self) -> None:
        return None


register(NbdDriver)
