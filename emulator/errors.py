"""Every error of the emulator, drawn in one place.

    LiveDiskError
    ├── BlockError            a request on the graph or on an image was refused (QMP class GenericError)
    │   ├── ImageError        an image's content is not what its format demands
    │   │   └── CorruptImage  damage was found at run time; the image is marked corrupt
    │   ├── PermissionConflict  two users of a node do not allow each other
    │   └── LockError         another process holds the image
    ├── NodeNotFound          QMP class GenericError or DeviceNotFound, as QEMU answers
    ├── DeviceNotFound        QMP class DeviceNotFound
    ├── DeviceNotActive       QMP class DeviceNotActive
    ├── CommandNotFound       QMP class CommandNotFound
    └── ParameterError        an argument or option is missing, unexpected or of the wrong kind

Failures of guest I/O are not here: they are `OSError` with an ``errno``, because that is what a guest, an NBD client
and
a job's error policy act on. An error says what was tried, on which node or file, and what to do; a text that a QMP
client may
match is QEMU's, word by word.
"""

from __future__ import annotations

from typing import ClassVar


def reason_of(error: Exception) -> str:
    """What went wrong, for people: a failed system call's file and words, without the number that Python puts before them."""
    if not isinstance(error, OSError):
        return str(error)
    return (f"{error.filename}: " if error.filename else "") + (error.strerror or str(error))


class LiveDiskError(Exception):
    """Root of the tree. ``str(error)`` is the text a person reads and QMP's ``desc``.

    ``qmp_class`` is QMP's error class; ``hint`` an optional next step, printed to people (QEMU prints it on stderr
    and in HMP) but
    not part of ``desc``.
    """

    qmp_class: ClassVar[str] = "GenericError"

    def __init__(self, desc: str, *, hint: str = "") -> None:
        super().__init__(desc)
        self.hint = hint


class BlockError(LiveDiskError):
    """A request on the graph or on an image was refused."""


class ImageError(BlockError):
    """An image's content is not what its format demands."""


class CorruptImage(ImageError):
    """Damage found while running."""


class PermissionConflict(BlockError):
    """Two users of a node do not allow each other."""


class LockError(BlockError):
    """Another process holds the image."""


class NodeNotFound(BlockError):
    """No node of that name."""


class DeviceNotFound(LiveDiskError):
    """No device, node or block backend of that name, where QEMU answers with class DeviceNotFound."""

    qmp_class: ClassVar[str] = "DeviceNotFound"


class DeviceNotActive(LiveDiskError):
    """The device or job is not active."""

    qmp_class: ClassVar[str] = "DeviceNotActive"


class CommandNotFound(LiveDiskError):
    """No command of that name."""

    qmp_class: ClassVar[str] = "CommandNotFound"


class ParameterError(LiveDiskError):
    """An argument of a command or an option of the command line was refused before anything was done.

    The text is that of QEMU's visitors; ``hint`` may list what would have been accepted.
    """
