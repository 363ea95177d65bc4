"""What a folder of backups holds: ``manifest.json``, written whole or not at all.

One process works in a folder at a time: `locked`. A change is written beside the old manifest, synced, and renamed over it.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from livedisk.emulator.errors import LiveDiskError

NAME: Final = "manifest.json"
FORMAT: Final = 1
_CHUNK: Final = 4 << 20


class BackupError(LiveDiskError):
    """A backup, or a step of one, is not possible or failed; the text says why and what to do."""


class Kind(enum.StrEnum):
    """How much of a disk an image of the folder holds."""

    FULL = "full"
    INCREMENTAL = "incremental"


class Image(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One disk at one checkpoint.

    ``file``: its name in the folder; ``parent``: that of its backing file; ``virtual_size``, ``file_size``, ``copied``:
    bytes; ``seconds``: how long the copy took; ``node``, ``bitmap``: what tracks the disk since; ``reason``: why it is
    what it is.
    """

    kind: Kind
    reason: str
    file: str
    parent: str | None = None
    node: str
    bitmap: str
    persistent: bool = True
    virtual_size: int
    file_size: int = 0
    copied: int = 0
    seconds: float = 0.0
    sha256: str = ""


class Checkpoint(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """One moment of one or more disks. ``time``: ISO 8601, UTC."""

    number: int
    time: str
    images: dict[str, Image]


class Pending(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What a run under way has made or may have made, for the next one to clear away if it does not come to its end."""

    files: list[str] = []
    jobs: list[str] = []
    nodes: list[str] = []
    bitmaps: list[tuple[str, str]] = []
    """(node, bitmap)."""


class Manifest(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """See the module. ``id``: eight hexadecimal digits that are this folder's, part of all names made in an emulator."""

    livedisk_backup: int = FORMAT
    id: str
    checkpoints: list[Checkpoint] = []
    pending: Pending | None = None

    @property
    def prefix(self) -> str:
        """What the names of the folder's bitmaps, nodes and jobs begin with."""
        return f"livedisk-{self.id}-"

    def latest(self, disk: str) -> Image | None:
        """The newest image of a disk."""
        for checkpoint in reversed(self.checkpoints):
            if disk in checkpoint.images:
                return checkpoint.images[disk]
        return None

    def find(self, number: int | None) -> Checkpoint:
        """A checkpoint by number; the newest for None. Raises BackupError."""
        for checkpoint in reversed(self.checkpoints):
            if number is None or checkpoint.number == number:
                return checkpoint
        if number is None:
            raise BackupError("the folder holds no checkpoint yet")
        known = ", ".join(str(checkpoint.number) for checkpoint in self.checkpoints) or "none"
        raise BackupError(f"there is no checkpoint {number}; there are: {known}")

    def image(self, file: str) -> Image:
        """The image that is stored in ``file``. Raises BackupError."""
        for checkpoint in self.checkpoints:
            for image in checkpoint.images.values():
                if image.file == file:
                    return image
        raise BackupError(f"{file} is not in the manifest")

    def chain(self, image: Image) -> list[Image]:
        """The image and those below it, down to a full one. Raises BackupError."""
        found = [image]
        while image.parent is not None:
            image = self.image(image.parent)
            if image in found:
                raise BackupError(f"the manifest has {image.file} as its own parent")
            found.append(image)
        return found


def load(folder: Path) -> Manifest:
    """The folder's manifest. Raises BackupError where there is none or it is no manifest."""
    path = folder / NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise _no_backup(folder) from None
    except OSError as error:
        raise BackupError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BackupError(f"{path} is not a backup's manifest: {error}") from None
    if manifest.livedisk_backup != FORMAT:
        raise BackupError(f"{path} has format {manifest.livedisk_backup}; this livedisk knows {FORMAT}")
    for checkpoint in manifest.checkpoints:
        for image in checkpoint.images.values():
            _check_name(path, image.file)
            if image.parent is not None:
                _check_name(path, image.parent)
    for file in manifest.pending.files if manifest.pending is not None else ():
        _check_name(path, file)
    return manifest


def _no_backup(folder: Path) -> BackupError:
    return BackupError(f"{folder} holds no backup: there is no {NAME} in it (make a full backup first)")


def _check_name(path: Path, name: str) -> None:
    """Files of a manifest lie in its folder: nobody's manifest makes us read or delete anything else."""
    if not name or "/" in name or name in (".", "..", NAME):
        raise BackupError(f"{path} names a file outside its folder: {name!r}")


def load_or_new(folder: Path) -> Manifest:
    """The folder's manifest, or a new one, not yet saved, for a folder that is empty or not there. Raises BackupError."""
    try:
        inside = {entry.name for entry in folder.iterdir()} - {".lock"}
    except FileNotFoundError:
        inside = set()
    except OSError as error:
        raise BackupError(f"{folder}: {error.strerror}") from None
    if NAME in inside:
        return load(folder)
    if inside:
        raise BackupError(f"{folder} holds other files and no {NAME}: give an empty or a new folder")
    return Manifest(id=secrets.token_hex(4))


def save(folder: Path, manifest: Manifest) -> None:
    """Put the manifest on stable storage in place of the one before. Raises OSError."""
    path, beside = folder / NAME, folder / f"{NAME}.new"
    with open(beside, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put the folder's names on stable storage. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Keep other runs off the folder. ``make``: create it if it is not there; else it must hold a backup. Raises BackupError."""
    try:
        if make:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        elif not (folder / NAME).exists():
            raise _no_backup(folder)
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise BackupError(f"{error.filename}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError(f"another run of livedisk backup works in {folder}: wait for its end") from None
        yield
    finally:
        os.close(fd)


def checksum(path: Path, advance: Callable[[int], None]) -> tuple[int, str]:
    """A file's size (bytes) and SHA-256, hexadecimal; ``advance`` is told of bytes read. The file is synced before. Raises
    OSError."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            advance(count)
    return size, digest.hexdigest()
