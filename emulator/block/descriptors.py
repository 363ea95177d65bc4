"""Descriptors that somebody passed to this process: by name for sockets, in numbered sets for files.

    getfd NAME      -> `Names` of the monitor that it came by; an address ``{"type": "fd", "str": NAME}`` takes it out
    add-fd, -add-fd -> `sets`; whoever opens ``/dev/fdset/N`` gets a copy of the one whose access mode fits

Sets belong to the process, as descriptors do. Opening a name of a set never opens a path: it copies (dup) the youngest
descriptor of the set that has the wanted access mode and the wanted O_DIRECT. A copy shares its open file description
with the set and with every other copy of it, and so its locks: a `Lease` keeps account of what each copy locks, so
that one user's unlocking leaves the others' locks alone and two users of a description conflict as users of two files
would (in QEMU they do not). A set is gone when it has neither descriptors nor copies.

Source: QEMU ``monitor/fds.c``, ``util/osdep.c`` (qemu_open_internal, qemu_dup_flags), ``util/qemu-sockets.c``
(socket_get_fd); messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from livedisk.emulator.errors import BlockError, LiveDiskError

PREFIX: Final = "/dev/fdset/"
_MAX_FD: Final = 2**31 - 1
_MATCHED: Final = os.O_ACCMODE | os.O_DIRECT
_TRUNCATES: Final = os.O_CREAT | os.O_EXCL
NOT_SENT: Final = "No file descriptor supplied via SCM_RIGHTS"


# -- by name -----------------------------------------------------------------------------------------------------------
class Names:
    """The named descriptors of one monitor. ``receive``: the descriptor that came with the bytes read last, or None."""

    def __init__(self, receive: Callable[[], int | None]) -> None:
        self._receive = receive
        self._fds: dict[str, int] = {}

    def received(self) -> int:
        """The descriptor that was sent with a command, which is the caller's now. Raises LiveDiskError if there is none."""
        fd = self._receive()
        if fd is None:
            raise LiveDiskError(NOT_SENT)
        return fd

    def add(self, name: str, fd: int) -> None:
        """Keep a descriptor; one that had the name is closed."""
        if name in self._fds:
            os.close(self._fds[name])
        self._fds[name] = fd

    def take(self, name: str) -> int | None:
        """Give a descriptor away."""
        return self._fds.pop(name, None)


_current: ContextVar[Names | None] = ContextVar("monitor's descriptors", default=None)
"""Of the monitor whose command runs, in that command and the tasks that it starts; None elsewhere."""


@contextmanager
def of_monitor(names: Names) -> Iterator[None]:
    """What runs within is a monitor's command: names are looked up among that monitor's."""
    token = _current.set(names)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Names:
    """Of the monitor whose command runs. Raises LiveDiskError outside of commands, where nothing can have been sent."""
    names = _current.get()
    if names is None:
        raise LiveDiskError(NOT_SENT)
    return names


def take_socket(text: str) -> socket.socket:
    """The socket behind an address of type fd, which is the caller's now: in a monitor's command a name that getfd
    gave, on the command line a number that this process inherited.

    Raises LiveDiskError in QEMU's words. What is no socket is closed where it was named, for its name is gone.
    """
    named = _named(text)
    if named is not None:
        try:
            return _as_socket(named, text)
        except LiveDiskError:
            os.close(named)
            raise
    return _as_socket(_inherited(text), text)


def refuse_socket(taken: socket.socket) -> None:
    """What `take_socket` gave is of no use: a named one is closed, a number stays whose it was."""
    if _current.get() is None:
        taken.detach()
    else:
        taken.close()


def copy_socket(text: str) -> socket.socket:
    """As `take_socket`; but a number stays whose it is, so that it can be asked for again."""
    named = _named(text)
    if named is None:
        number = _inherited(text)
        try:
            named = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError:
            raise LiveDiskError(f"File descriptor '{text}' is not a socket") from None
    try:
        return _as_socket(named, text)
    except LiveDiskError:
        os.close(named)
        raise


def _named(text: str) -> int | None:
    """What getfd gave that name; None where no monitor's command runs. Raises LiveDiskError."""
    names = _current.get()
    if names is None:
        return None
    fd = names.take(text)
    if fd is None:
        raise LiveDiskError(f"File descriptor named '{text}' has not been found")
    return fd


def _inherited(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_FD:
        raise LiveDiskError(f"Unable to parse FD number {text}")
    return int(text)


def _as_socket(fd: int, text: str) -> socket.socket:
    try:
        taken = socket.socket(fileno=fd)
    except OSError:
        raise LiveDiskError(f"File descriptor '{text}' is not a socket") from None
    taken.setblocking(False)
    return taken


# -- in sets -----------------------------------------------------------------------------------------------------------
class Member:
    """A descriptor of a set and the copies of it that are in use."""

    def __init__(self, fd: int, opaque: str | None) -> None:
        self.fd = fd
        self.opaque = opaque
        self.leases: list[Lease] = []


class Lease:
    """A copy of a set's descriptor. ``locked``: the bytes of the file that its user has locked."""

    def __init__(self, member: Member, on_release: Callable[[Lease], None]) -> None:
        self._member = member
        self._on_release = on_release
        self.locked: set[int] = set()
        member.leases.append(self)

    def others_lock(self, byte: int) -> bool:
        """Whether another copy of the same descriptor needs the lock on ``byte``."""
        return any(byte in lease.locked for lease in self._member.leases if lease is not self)

    def release(self) -> None:
        """The copy is closed, or about to be. The second time does nothing."""
        if self in self._member.leases:
            self._member.leases.remove(self)
            self._on_release(self)


class _Set:
    """``members``: what add-fd added and remove-fd has not removed; ``leases``: copies of these, and of removed ones."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.leases: list[Lease] = []


class DescriptorSets:
    """Numbered sets of descriptors. Iterating gives the highest number first, as QEMU lists them."""

    def __init__(self) -> None:
        self._sets: dict[int, _Set] = {}

    def __iter__(self) -> Iterator[tuple[int, list[Member]]]:
        return iter([(number, one.members) for number, one in sorted(self._sets.items(), reverse=True)])

    def add(self, fd: int, number: int | None, opaque: str | None) -> int:
        """Put ``fd`` into a set, which owns it then; None: into a new one, with the lowest number free. Returns the
        number. Raises LiveDiskError for a negative one."""
        if number is None:
            number = next(free for free in range(len(self._sets) + 1) if free not in self._sets)
        if number < 0:
            raise LiveDiskError("Parameter 'fdset-id' expects a non-negative value")
        self._sets.setdefault(number, _Set()).members.append(Member(fd, opaque))
        return number

    def remove(self, number: int, fd: int | None) -> None:
        """Close a descriptor of a set, or all of it. Copies in use stay. Raises LiveDiskError where there is none."""
        one = self._sets.get(number)
        found = [member for member in one.members if fd is None or member.fd == fd] if one else []
        if one is None or (fd is not None and not found):
            name = f"fdset-id:{number}" if fd is None else f"fdset-id:{number}, fd:{fd}"
            raise LiveDiskError(f"File descriptor named '{name}' not found")
        for member in found:
            one.members.remove(member)
            os.close(member.fd)
        self._forget_if_empty(number)

    def open(self, path: str, flags: int) -> tuple[int, Lease]:
        """A copy of the set's descriptor that fits. Raises BlockError, in QEMU's words, where there is none."""
        text = path.removeprefix(PREFIX)
        if not text.isdecimal() or not text.isascii():
            raise BlockError(f"Could not parse fdset {path}")
        number = int(text)
        one = self._sets.get(number)
        if one is None:
            raise BlockError(f"Failed to find fdset {path}", hint="'add-fd' adds one; 'query-fdsets' lists them.")
        wanted = flags & ~os.O_CLOEXEC
        for member in reversed(one.members):  # the youngest that fits
            if fcntl.fcntl(member.fd, fcntl.F_GETFL) & _MATCHED == wanted & _MATCHED:
                break
        else:
            raise BlockError(f"Failed to find file descriptor with matching flags=0x{wanted:x}")
        fd = fcntl.fcntl(member.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            if flags & os.O_APPEND:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
            if flags & os.O_TRUNC or flags & _TRUNCATES == _TRUNCATES:
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise

        def released(lease: Lease) -> None:
            one.leases.remove(lease)
            self._forget_if_empty(number)

        lease = Lease(member, released)
        one.leases.append(lease)
        return fd, lease

    def _forget_if_empty(self, number: int) -> None:
        one = self._sets[number]
        if not one.members and not one.leases:
            del self._sets[number]


sets: Final = DescriptorSets()
"""The process's."""


def inherit(fd: int, number: int, opaque: str | None) -> None:
    """``-add-fd``: put a descriptor that this process was started with into a set. Raises LiveDiskError in QEMU's words.

    What this process opened itself is close-on-exec, what it inherited cannot be.
    """
    if fd < 0:
        raise LiveDiskError("fd option is required and must be non-negative")
    if fd <= 2:
        raise LiveDiskError("fd cannot be a standard I/O stream")
    try:
        inherited = not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except (OSError, OverflowError):
        inherited = False
    if not inherited:
        raise LiveDiskError("fd is not valid or already in use")
    if number < 0:
        raise LiveDiskError("set option is required and must be non-negative")
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    sets.add(fd, number, opaque)


def open_file(path: str, flags: int, mode: int = 0o644) -> tuple[int, Lease | None]:
    """open(2) for names that may be one of a set (QEMU: qemu_open). Raises OSError; BlockError for a set."""
    if path.startswith(PREFIX):
        return sets.open(path, flags)
    return os.open(path, flags | os.O_CLOEXEC, mode), None
