"""getfd, closefd, add-fd, remove-fd, query-fdsets: descriptors that a client sends over the monitor's Unix socket.

What they are for, and where they end: ``block/descriptors.py``. Source: QEMU ``qapi/misc.json``, ``monitor/fds.c``.
"""

from __future__ import annotations

import os

from livedisk.emulator.block import descriptors
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command


class Fdname(QapiStruct):
    """The name of a descriptor, in one monitor."""

    fdname: str


@command("getfd")
async def getfd(ctx: Context, args: Fdname) -> None:
    """Keep the descriptor that was sent with the command under a name. What had the name is closed."""
    names = descriptors.current()
    fd = names.received()
    if args.fdname[:1].isdecimal():
        os.close(fd)
        raise LiveDiskError("Parameter 'fdname' expects a name not starting with a digit")
    names.add(args.fdname, fd)


@command("closefd")
async def closefd(ctx: Context, args: Fdname) -> None:
    """Close a descriptor that getfd keeps."""
    fd = descriptors.current().take(args.fdname)
    if fd is None:
        raise LiveDiskError(f"File descriptor named '{args.fdname}' not found")
    os.close(fd)


class AddFd(QapiStruct):
    """``fdset-id``: the set, which is made if it is not there; without: a new one. ``opaque``: what queries show."""

    fdset_id: int | UnsetType = UNSET
    opaque: str | UnsetType = UNSET


class AddfdInfo(QapiStruct):
    """``fd``: the number that the descriptor has in this process."""

    fdset_id: int
    fd: int


@command("add-fd")
async def add_fd(ctx: Context, args: AddFd) -> AddfdInfo:
    """Put the descriptor that was sent with the command into a set: ``/dev/fdset/N`` opens it."""
    fd = descriptors.current().received()
    number = args.fdset_id if isinstance(args.fdset_id, int) else None
    try:
        number = descriptors.sets.add(fd, number, args.opaque if isinstance(args.opaque, str) else None)
    except LiveDiskError:
        os.close(fd)
        raise
    return AddfdInfo(fdset_id=number, fd=fd)


class RemoveFd(QapiStruct):
    """``fd``: as add-fd said; without: all of the set's."""

    fdset_id: int
    fd: int | UnsetType = UNSET


@command("remove-fd")
async def remove_fd(ctx: Context, args: RemoveFd) -> None:
    """Close descriptors of a set. Who opened one of them keeps it."""
    descriptors.sets.remove(args.fdset_id, args.fd if isinstance(args.fd, int) else None)


class FdsetFdInfo(QapiStruct):
    """A descriptor of a set."""

    fd: int
    opaque: str | UnsetType = UNSET


class FdsetInfo(QapiStruct):
    """A set. One without descriptors is there for as long as somebody has a file open that came from it."""

    fdset_id: int
    fds: list[FdsetFdInfo]


@command("query-fdsets")
async def query_fdsets(ctx: Context) -> list[FdsetInfo]:
    """Every set of descriptors."""
    return [
        FdsetInfo(
            fdset_id=number,
            fds=[FdsetFdInfo(fd=one.fd, opaque=UNSET if one.opaque is None else one.opaque) for one in members],
        )
        for number, members in descriptors.sets
    ]
