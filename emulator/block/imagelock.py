"""Image locks, as QEMU takes them: each permission is a byte of the file, locked for as long as it is held.

    byte 100 + i    locked while permission i is used       (``RAW_LOCK_PERM_BASE``)
    byte 200 + i    locked while permission i is *not* shared (``RAW_LOCK_SHARED_BASE``)

i is the number of the permission's bit (`Perm`). All are *read* locks on the open file description, so that any number
of processes can hold each; a conflict is found by asking whether a *write* lock could be placed: on ``200 + i`` for each
permission that is wanted, on ``100 + i`` for each that is not shared. First lock, then ask: of two that come at once,
at least one sees the other. livedisk and QEMU thus refuse each other's images in both directions.

Locks belong to the open file description: they end when its last descriptor is closed, also by ``kill -9``. Where the
description is shared with others of this process (a set's descriptor, ``descriptors.py``), the kernel cannot tell them
apart: the lease says what the others hold. Source: QEMU ``block/file-posix.c`` (raw_apply_lock_bytes,
raw_check_lock_bytes).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from livedisk.emulator.block.descriptors import Lease
from livedisk.emulator.block.permissions import Perm, perm_names
from livedisk.emulator.errors import LockError

USED_BASE: Final = 100
UNSHARED_BASE: Final = 200

_FLOCK: Final = struct.Struct("@hhqqi0q")
"""struct flock: type, whence, start, length, pid."""


class ImageLock:
    """The locks that one open file holds.

    ``prepare`` takes what new permissions need and checks them against other processes; then either ``commit`` drops
    what is no longer needed, or ``abort`` what was taken. The descriptor is given with each call, for it may change.
    ``lease``: of a descriptor whose description is shared with others.
    """

    def __init__(self, path: str, lease: Lease | None = None) -> None:
        self._path = path
        self._lease = lease
        self._used = Perm.NONE
        self._unshared = Perm.NONE
        self._held: set[int] = set()

    def prepare(self, fd: int, perm: Perm, shared: Perm) -> None:
        """Raise LockError, with everything as it was, if another process does not allow these."""
        unshared = ~shared & Perm.ALL
        if not perm & ~self._used and not unshared & ~self._unshared:
            return  # only giving up: it cannot conflict
        try:
            self._take(fd, self._used | perm, self._unshared | unshared)
            self._check(fd, perm, unshared)
        except LockError:
            self.abort(fd)
            raise

    def commit(self, fd: int, perm: Perm, shared: Perm) -> None:
        """Hold exactly these, which `prepare` was asked for."""
        self._used, self._unshared = perm, ~shared & Perm.ALL
        self._drop(fd)

    def abort(self, fd: int) -> None:
        """Hold what was held before `prepare`."""
        self._drop(fd)

    def copy_to(self, fd: int, lease: Lease | None = None) -> None:
        """Take every lock that is held also through another open file description of the same file."""
        for byte in self._held:
            _lock(fd, byte, fcntl.F_RDLCK)
            if lease is not None:
                lease.locked.add(byte)

    def move(self, lease: Lease | None) -> None:
        """What was copied is what is used from here on."""
        self._lease = lease

    def _take(self, fd: int, used: Perm, unshared: Perm) -> None:
        for byte in _bytes(used, unshared):
            if byte not in self._held:
                try:
                    _lock(fd, byte, fcntl.F_RDLCK)
                except OSError as error:
                    raise LockError(f"Failed to lock byte {byte}: {os.strerror(error.errno or 0)}") from error
                self._held.add(byte)
                if self._lease is not None:
                    self._lease.locked.add(byte)

    def _drop(self, fd: int) -> None:
        for byte in self._held - set(_bytes(self._used, self._unshared)):
            if self._lease is not None:
                unlock(fd, byte, self._lease)
            else:
                _lock(fd, byte, fcntl.F_UNLCK)
            self._held.discard(byte)

    def _check(self, fd: int, perm: Perm, unshared: Perm) -> None:
        for bit in perm:
            if self._is_locked(fd, UNSHARED_BASE + _number(bit)):
                self._refuse(fd, "", bit, UNSHARED_BASE)
        for bit in unshared:
            if self._is_locked(fd, USED_BASE + _number(bit)):
                self._refuse(fd, "shared ", bit, USED_BASE)

    def _is_locked(self, fd: int, byte: int) -> bool:
        return _is_locked(fd, byte) or (self._lease is not None and self._lease.others_lock(byte))

    def _refuse(self, fd: int, shared: str, bit: Perm, base: int) -> None:
        hint = f"Is another process using the image [{self._path}]?"
        holders = ", ".join(lock_holders(fd, base + _number(bit)))
        if holders:
            hint += f"\nIt is locked by {holders}."
        raise LockError(f'Failed to get {shared}"{perm_names(bit)}" lock', hint=hint)


def _number(bit: Perm) -> int:
    return int(bit).bit_length() - 1


def _bytes(used: Perm, unshared: Perm) -> Iterator[int]:
    for bit in Perm.ALL:
        if used & bit:
            yield USED_BASE + _number(bit)
        if unshared & bit:
            yield UNSHARED_BASE + _number(bit)


def _lock(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def unlock(fd: int, byte: int, lease: Lease) -> None:
    """Give up a lock that is shared with the other users of the descriptor: the last of them takes it away."""
    lease.locked.discard(byte)
    if not lease.others_lock(byte):
        _lock(fd, byte, fcntl.F_UNLCK)


def give_up(fd: int, lease: Lease | None) -> None:
    """Close a descriptor. What it locked is unlocked, also where the description lives on in a set."""
    if lease is not None:
        for byte in list(lease.locked):
            unlock(fd, byte, lease)
        lease.release()
    os.close(fd)


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on the byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def lock_holders(fd: int, byte: int) -> list[str]:
    """Who, as far as this process may see, locks the byte through another descriptor: "qemu-img (process 123)".

    The kernel names no process for locks of open file descriptions, so every process' descriptors of the same file
    are looked at. Slow (it walks /proc); only for error messages.
    """
    image = os.fstat(fd)
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and _process_locks(entry.name, image, byte, fd):
            found.append(_process_name(entry.name))
    return found


def _process_locks(process: str, image: os.stat_result, byte: int, fd: int) -> bool:
    own = int(process) == os.getpid()
    try:
        descriptors = os.listdir(f"/proc/{process}/fd")
    except OSError:
        return False  # gone, or not ours to look at
    for number in descriptors:
        if own and int(number) == fd:
            continue
        try:
            target = os.stat(f"/proc/{process}/fd/{number}")
            if (target.st_dev, target.st_ino) != (image.st_dev, image.st_ino):
                continue
            with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii", errors="replace") as info:
                if any(_covers(line, byte) for line in info if line.startswith("lock:")):
                    return True
        except OSError:
            continue  # closed meanwhile
    return False


def _covers(line: str, byte: int) -> bool:
    """``lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101``: the last two are the first and last byte."""
    first, last = line.split()[-2:]
    return int(first) <= byte and (last == "EOF" or byte <= int(last))


def _process_name(process: str) -> str:
    if int(process) == os.getpid():
        return "this process"
    try:
        with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as name:
            return f"{name.read().strip()} (process {process})"
    except OSError:
        return f"process {process}"
