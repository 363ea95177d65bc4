"""The stream between two livedisk processes: a magic, then messages, each its length (32 bits) and MessagePack.

Every message is a tagged Struct: what does not decode as one of them, in type and range, ends the connection. The version is
that of the whole protocol; both sides must have the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from struct import Struct
from typing import Any, Final, TypeVar

import msgspec

from livedisk.emulator.errors import LiveDiskError

MAGIC: Final = b"livedisk-migrate"
QEMU_MAGIC: Final = b"QEVM"
VERSION: Final = 1
_LENGTH: Final = Struct(">I")
_DROP: Final = Struct("ii").pack(1, 0)
"""SO_LINGER, on, for no time: the kernel forgets what it has not sent when the socket is closed."""
_LONGEST: Final = 8 << 20
"""Bytes of one message."""

M = TypeVar("M")


class MigrationError(LiveDiskError):
    """A migration failed, or was refused."""


class Disk(msgspec.Struct, frozen=True):
    """A device as the source has it. ``options``: its properties, as device_add takes them. Sizes in bytes."""

    path: str
    node: str
    size: int
    read_only: bool
    options: dict[str, Any]


class Served(msgspec.Struct, frozen=True):
    """An export of a device (``device``: its path) or of a node, as nbd-server-add and block-export-add would make it."""

    id: str
    name: str
    description: str
    writable: bool
    device: str
    node: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message. ``exports`` are to be made on the destination."""

    version: int
    disks: list[Disk]
    exports: list[Served]


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The destination can take all of it."""


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The destination cannot; it is as before."""

    reason: str


class DeviceState(msgspec.Struct, frozen=True, tag=True):
    """What a driver changed in a device."""

    path: str
    write_cache: bool


class Bitmap(msgspec.Struct, frozen=True, tag=True):
    """A dirty bitmap; its bits follow in `BitmapBits`, packed in qcow2's order, until ``length`` bytes are there."""

    node: str
    name: str
    granularity: int
    size: int
    length: int
    persistent: bool
    recording: bool


class BitmapBits(msgspec.Struct, frozen=True, tag=True):
    """A piece of the bits of the last `Bitmap`."""

    data: bytes


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Take over. ``ends``: ids of exports that filled the disks and end now."""

    ends: list[str]


class Activated(msgspec.Struct, frozen=True, tag=True):
    """Everything is ready to run."""


class Go(msgspec.Struct, frozen=True, tag=True):
    """The source has given the guest up. ``running``: whether it ran."""

    running: bool


class Running(msgspec.Struct, frozen=True, tag=True):
    """The destination has the guest."""


Message = Hello | Welcome | Refusal | DeviceState | Bitmap | BitmapBits | Switch | Activated | Go | Running
_DECODER: Final = msgspec.msgpack.Decoder(Message)
_ENCODER: Final = msgspec.msgpack.Encoder()


class Channel:
    """One connection. ``peer`` names the other side in messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        self._reader = reader
        self._writer = writer
        self._peer = peer

    async def greet(self) -> None:
        """Send the magic."""
        self._writer.write(MAGIC)
        await self._writer.drain()

    async def send(self, message: Message) -> None:
        """Send one message; waits while the other side reads slowly. Raises MigrationError."""
        data = _ENCODER.encode(message)
        try:
            self._writer.write(_LENGTH.pack(len(data)) + data)
            await self._writer.drain()
        except OSError as error:
            raise MigrationError(f"the connection to the {self._peer} broke: {error}") from None

    async def receive(self) -> Message:
        """The next message. Raises MigrationError, also where it is none."""
        try:
            length = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))[0]
            if length > _LONGEST:
                raise MigrationError(f"the {self._peer} sent a message of {length} bytes")
            message: Message = _DECODER.decode(await self._reader.readexactly(length))
            return message
        except asyncio.IncompleteReadError:
            raise MigrationError(f"the {self._peer} closed the connection") from None
        except OSError as error:
            raise MigrationError(f"the connection to the {self._peer} broke: {error}") from None
        except msgspec.DecodeError as error:
            raise MigrationError(f"the {self._peer} sent what is no message: {error}") from None

    async def expect(self, kind: type[M]) -> M:
        """The next message, which must be a ``kind``. Raises MigrationError, with the reason if it is a refusal."""
        message = await self.receive()
        if isinstance(message, Refusal):
            raise MigrationError(f"the {self._peer} refused: {message.reason}")
        if not isinstance(message, kind):
            raise MigrationError(f"the {self._peer} sent {type(message).__name__} where {kind.__name__} was due")
        return message

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """A part of the conversation that may take so long. Raises MigrationError where it takes longer."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise MigrationError(f"the {self._peer} did not answer within {seconds:g} seconds") from None

    def abort(self) -> None:
        """Cut the connection. What was sent and has not arrived never does."""
        sock = self._writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP)
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close, when what was sent has left."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
