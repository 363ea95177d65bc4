"""The disks that the contract suite runs over: one entry a way to store bytes. To add one, append it to `VARIANTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.nbd_folder import exported
from kit.qemu import create, qemu_img

SIZE = (300 << 10) + 3 * 512
"""Bytes of every disk: more than one host page, L2 entry and granule; no power of two."""


@dataclass(frozen=True)
class Variant:
    """A disk and what may be done with it.

    ``make(folder, size)`` makes its files and returns the options of its top node, as QMP takes them, without node-name.
    ``content``: what a new disk of that size reads as. ``resizable``: `truncate` works.
    """

    name: str
    make: Callable[[Path, int], dict[str, Any]]
    resizable: bool = True
    content: Callable[[int], bytes] = field(default=bytes)


def pattern(size: int) -> bytes:
    """Content in which every 512 bytes differ, none of them zero."""
    block = b"".join((index % 255 + 1).to_bytes(1, "little") * 512 for index in range(255))
    return (block * (size // len(block) + 1))[:size]


def plain(folder: Path, size: int, **options: Any) -> dict[str, Any]:
    """A raw file on the host, filled with `pattern`; the options of its protocol node."""
    path = folder / "plain.raw"
    if not path.exists():
        path.write_bytes(pattern(size))
    return {"driver": "file", "filename": str(path), **options}


def file_driver(**options: Any) -> Callable[[Path, int], dict[str, Any]]:
    return lambda folder, size: plain(folder, size, discard="unmap", **options)


def raw_driver(**options: Any) -> Callable[[Path, int], dict[str, Any]]:
    def make(folder: Path, size: int) -> dict[str, Any]:
        file = plain(folder, size, discard="unmap", **options)
        return {"driver": "raw", "discard": "unmap", "file": file}

    return make


def raw_part(folder: Path, size: int) -> dict[str, Any]:
    """A part of a larger file, which must not be touched around it."""
    path = folder / "large.raw"
    if not path.exists():
        path.write_bytes(b"\xaa" * 1536 + pattern(size) + b"\xbb" * 4096)
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": "raw", "offset": 1536, "size": size, "discard": "unmap", "file": file}


def raw_offset(folder: Path, size: int) -> dict[str, Any]:
    path = folder / "offset.raw"
    if not path.exists():
        path.write_bytes(b"\xaa" * 1024 + pattern(size)[:-100])  # the last sector is not whole: padded by zeroes
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"driver": "raw", "offset": 1024, "discard": "unmap", "file": file}


BLKDEBUG_LIMITS = {
    "align": 512,
    "max-transfer": 65536,
    "opt-write-zero": 8192,
    "max-write-zero": 65536,
    "opt-discard": 8192,
    "max-discard": 131072,
}


def blkdebug(**limits: Any) -> Callable[[Path, int], dict[str, Any]]:
    def make(folder: Path, size: int) -> dict[str, Any]:
        return {"driver": "blkdebug", "discard": "unmap", "image": plain(folder, size, discard="unmap"), **limits}

    return make


def qcow2(options: str = "", **node: Any) -> Callable[[Path, int], dict[str, Any]]:
    def make(folder: Path, size: int) -> dict[str, Any]:
        path = folder / "image.qcow2"
        if not path.exists():
            chosen = options.replace("DATA", str(folder / "data.raw"))
            create(path, size, options=chosen)
        file = {"driver": "file", "filename": str(path)}
        return {"driver": "qcow2", "discard": "unmap", "file": file, **node}

    return make


def blkverify(folder: Path, size: int) -> dict[str, Any]:
    image = folder / "verified.qcow2"
    if not image.exists():
        (folder / "fill.raw").write_bytes(pattern(size))
        qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "fill.raw", image)
    test = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    return {"driver": "blkverify", "discard": "unmap", "test": test, "raw": plain(folder, size)}


def blklogwrites(folder: Path, size: int) -> dict[str, Any]:
    log = folder / "log"
    log.touch()
    logged = {"driver": "file", "filename": str(log)}
    return {"driver": "blklogwrites", "discard": "unmap", "file": plain(folder, size, discard="unmap"), "log": logged}


def quorum(folder: Path, size: int) -> dict[str, Any]:
    paths = [folder / f"{number}.raw" for number in range(3)]
    for path in paths:
        if not path.exists():
            path.write_bytes(pattern(size))
    children = [{"driver": "file", "filename": str(path)} for path in paths]
    return {"driver": "quorum", "children": children, "vote-threshold": 2}


def preallocate(folder: Path, size: int) -> dict[str, Any]:
    file = plain(folder, size, discard="unmap")
    return {"driver": "preallocate", "discard": "unmap", "prealloc-size": 1 << 20, "prealloc-align": 4096, "file": file}


def compress(folder: Path, size: int) -> dict[str, Any]:
    return {"driver": "compress", "discard": "unmap", "file": qcow2("cluster_size=4k")(folder, size)}


def overlay(options: str = "", shorter: int = 0) -> Callable[[Path, int], dict[str, Any]]:
    """A qcow2 image on a raw one with `pattern`, ``shorter`` bytes shorter than itself."""

    def make(folder: Path, size: int) -> dict[str, Any]:
        base = plain(folder, size - shorter)
        disk = qcow2(options)(folder, size)
        return {**disk, "backing": {"driver": "raw", "read-only": True, "file": base}}

    return make


def _above_short(size: int) -> bytes:
    return pattern(size - 100 * 1024) + bytes(100 * 1024)


VARIANTS: list[Variant] = [
    Variant("file", file_driver(), content=pattern),
    Variant("file-direct", file_driver(cache={"direct": True}), content=pattern),
    Variant("file-detect-zeroes", file_driver(**{"detect-zeroes": "unmap"}), content=pattern),
    Variant("raw", raw_driver(), content=pattern),
    Variant("raw-direct", raw_driver(cache={"direct": True}), content=pattern),
    Variant("raw-part", raw_part, resizable=False, content=pattern),
    Variant("raw-offset", raw_offset, resizable=False, content=lambda size: pattern(size)[:-100] + bytes(100)),
    Variant("blkdebug", blkdebug(), content=pattern),
    Variant("blkdebug-limits", blkdebug(**BLKDEBUG_LIMITS), resizable=False, content=pattern),
    Variant("nbd", exported(pattern), resizable=False, content=pattern),
    Variant(
        "nbd-blocks",
        exported(
            pattern,
            "--filter=blocksize-policy",
            "blocksize-error-policy=error",
            "blocksize-minimum=512",
            "blocksize-preferred=4096",
            "blocksize-maximum=65536",
        ),
        resizable=False,
        content=pattern,
    ),
    Variant("blkverify", blkverify, resizable=False, content=pattern),
    Variant("blklogwrites", blklogwrites, content=pattern),
    Variant("preallocate", preallocate, content=pattern),
    Variant("quorum", quorum, resizable=False, content=pattern),
    Variant("compress", compress, resizable=False),
    Variant("qcow2", qcow2()),
    Variant("qcow2-512", qcow2("cluster_size=512")),
    Variant("qcow2-2M", qcow2("cluster_size=2M")),
    Variant("qcow2-v2", qcow2("compat=0.10")),
    Variant("qcow2-extended-l2", qcow2("cluster_size=16k,extended_l2=on")),
    Variant("qcow2-lazy", qcow2("lazy_refcounts=on")),
    Variant("qcow2-refcount-1", qcow2("refcount_bits=1")),
    Variant("qcow2-refcount-64", qcow2("refcount_bits=64")),
    Variant("qcow2-preallocated", qcow2("preallocation=metadata")),
    Variant("qcow2-data-file", qcow2("data_file=DATA")),
    Variant("qcow2-data-file-raw", qcow2("data_file=DATA,data_file_raw=on")),
    Variant("qcow2-direct", qcow2(cache={"direct": True})),
    Variant("overlay", overlay(), content=pattern),
    Variant("overlay-4k", overlay("cluster_size=4k"), content=pattern),
    Variant("overlay-extended-l2", overlay("cluster_size=16k,extended_l2=on"), content=pattern),
    Variant("overlay-short", overlay("cluster_size=4k", shorter=100 * 1024), content=_above_short),
]
