"""An nbdkit plugin: the same graph of nodes, served by nbdkit instead of our own NBD server.

    nbdkit python .../livedisk/emulator/exports/nbdkit_plugin.py file=disk.qcow2 format=qcow2
    nbdkit python .../nbdkit_plugin.py blockdev='driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2'

nbdkit's filters (cow, rate, delay, error, ...) and its TLS then work on our disks. Parameters:

    file=PATH         the image to serve; with format=FORMAT (raw, qcow2, ...; required: nothing is guessed from what a
                      guest may have written)
    blockdev=OPTIONS  a node in the syntax of -blockdev (key=value or JSON); may be repeated, later ones refer to
                      earlier ones by name. The last one is served under the default export name, and each under its
                      node name
    path=FOLDER       where Python finds livedisk and what it needs: the site-packages of an environment. Not needed
                      where livedisk is installed for nbdkit's own Python, or this file stands in such a folder

nbdkit embeds the system's Python; ``path`` must be of the same version of Python. ``nbdkit -r`` serves read-only.

This module has nbdkit's callbacks only (API version 2); `nbdkit_disk` does the work, and is imported when ``path`` is
known. Source: nbdkit-python-plugin(3), nbdkit-plugin(3).
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import nbdkit  # type: ignore[import-not-found]  # exists inside nbdkit only

if TYPE_CHECKING:
    from livedisk.emulator.exports.nbdkit_disk import Client, Disk

API_VERSION = 2

Handle: TypeAlias = "Client"

_parameters: dict[str, str] = {}
_blockdevs: list[str] = []
_disk: Disk | None = None


def config(key: str, value: str) -> None:
    """A parameter of the command line."""
    if key == "blockdev":
        _blockdevs.append(value)
    elif key in ("file", "format", "path"):
        if key in _parameters:
            raise RuntimeError(f"parameter '{key}' is given twice")
        # nbdkit changes to / when it becomes a daemon.
        _parameters[key] = value if key == "format" else os.path.abspath(value)
    else:
        raise RuntimeError(f"unknown parameter '{key}'; known: file, format, blockdev, path")


def config_complete() -> None:
    """All parameters are there: check what can be checked before nbdkit goes into the background."""
    global _disk
    if ("file" in _parameters) == bool(_blockdevs):
        raise RuntimeError("give either file=PATH format=FORMAT, or blockdev=OPTIONS")
    if ("file" in _parameters) != ("format" in _parameters):
        raise RuntimeError("file= and format= go together: the format of an image is never guessed")
    _find_livedisk()
    from livedisk.emulator.exports.nbdkit_disk import Disk, file_options, node_options

    if _blockdevs:
        _disk = Disk([node_options(text) for text in _blockdevs])
    else:
        _disk = Disk([file_options(_parameters["file"], _parameters["format"])])


def _find_livedisk() -> None:
    """Put ``path``, or else the folder that this file is installed in, where Python looks for modules."""
    # nbdkit sets no __file__.
    here = Path(_find_livedisk.__code__.co_filename).resolve()
    if "path" in _parameters:
        # Reads the folder's .pth files too, which is how an editable installation works.
        site.addsitedir(_parameters["path"])
    elif here.parents[2].name == "livedisk" and str(here.parents[3]) not in sys.path:
        site.addsitedir(str(here.parents[3]))


def _running() -> Disk:
    assert _disk is not None  # nbdkit calls config_complete first
    return _disk


def thread_model() -> int:
    """Requests may come at the same time: each waits for the disk's own loop."""
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def after_fork() -> None:
    """Open the images: threads do not survive a fork, so not before."""
    _running().start()


def cleanup() -> None:
    """Nobody is connected any more: write back and close."""
    if _disk is not None:
        _disk.stop()


def list_exports(readonly: bool, is_tls: bool) -> Iterable[str]:
    """Every node that can be asked for by name."""
    return _running().names()


def default_export(readonly: bool, is_tls: bool) -> str:
    """What the empty export name stands for."""
    return _running().default


def open(readonly: bool) -> Handle:
    """A client connects to the export that it named."""
    return _running().connect(nbdkit.export_name(), writable=not readonly)


def close(h: Handle) -> None:
    """It is gone."""
    h.close()


def export_description(h: Handle) -> str:
    """For people."""
    return h.description


def get_size(h: Handle) -> int:
    """Bytes."""
    return h.size


def block_size(h: Handle) -> tuple[int, int, int]:
    """Smallest, preferred and largest request, bytes."""
    return h.block_size


def can_write(h: Handle) -> bool:
    """Not with -r, nor on a read-only node."""
    return h.writable


def can_multi_conn(h: Handle) -> bool:
    """All clients share one graph: a flush covers everybody's writes."""
    return True


def can_flush(h: Handle) -> bool:
    """Always."""
    return True


def can_trim(h: Handle) -> bool:
    """Always; the node may ignore it."""
    return True


def can_zero(h: Handle) -> bool:
    """Always."""
    return True


def can_fast_zero(h: Handle) -> bool:
    """A zero request that would be slow is refused quickly."""
    return True


def can_extents(h: Handle) -> bool:
    """Block status is known."""
    return True


def can_fua(h: Handle) -> int:
    """Written through on demand."""
    native: int = nbdkit.FUA_NATIVE
    return native


def can_cache(h: Handle) -> int:
    """Prefetching reads the range."""
    native: int = nbdkit.CACHE_NATIVE
    return native


def pread(h: Handle, buf: Any, offset: int, flags: int) -> None:
    """Fill ``buf``."""
    _try(h.read, offset, memoryview(buf))


def pwrite(h: Handle, buf: Any, offset: int, flags: int) -> None:
    """Write ``buf``."""
    _try(h.write, offset, memoryview(buf), fua=bool(flags & nbdkit.FLAG_FUA))


def flush(h: Handle, flags: int) -> None:
    """To stable storage."""
    _try(h.flush)


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """Discard."""
    _try(h.trim, offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """Write zeroes."""
    _try(
        h.zero,
        offset,
        count,
        fua=bool(flags & nbdkit.FLAG_FUA),
        may_unmap=bool(flags & nbdkit.FLAG_MAY_TRIM),
        fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
    )


def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    """Prefetch."""
    _try(h.cache, offset, count)


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """``(offset, length, type)`` of each extent; nbdkit's types are NBD's flags."""
    found: list[tuple[int, int, int]] = _try(h.extents, offset, count, one=bool(flags & nbdkit.FLAG_REQ_ONE))
    return found


def _try(call: Any, /, *arguments: Any, **options: Any) -> Any:
    """Run a request; the client gets the errno of a failure."""
    try:
        return call(*arguments, **options)
    except OSError as error:
        if error.errno is not None:
            nbdkit.set_error(error.errno)
        raise
