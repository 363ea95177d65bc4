"""Creation: what `qemu-img create` makes, we make; what it refuses, we refuse in its words, and touch nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kit.peers import run
from kit.plain_file import PlainFile
from kit.qemu import qemu_img
from livedisk.emulator.block.types import Preallocation
from livedisk.emulator.drivers.qcow2.create import (
    CompressionType,
    CreateOptions,
    Version,
    check_options,
    create,
    create_file,
)
from livedisk.emulator.drivers.qcow2.header import probe
from livedisk.emulator.errors import BlockError, LockError

MIB = 1 << 20
UNSET = msgspec.UNSET


def legacy(options: CreateOptions) -> str:
    """The same options as qemu-img's ``-o``."""
    words = [
        f"compat={'0.10' if options.version is Version.V2 else '1.1'}",
        f"cluster_size={options.cluster_size}",
        f"preallocation={options.preallocation}",
        f"refcount_bits={options.refcount_bits}",
    ]
    switches = {
        "lazy_refcounts": options.lazy_refcounts,
        "extended_l2": options.extended_l2,
        "data_file_raw": options.data_file_raw,
    }
    words += [f"{name}=on" for name, on in switches.items() if on]
    if options.compression_type is not CompressionType.ZLIB:
        words.append(f"compression_type={options.compression_type}")
    if isinstance(options.data_file, str):
        words.append(f"data_file={options.data_file}")
    if isinstance(options.backing_file, str):
        words.append(f"backing_file={options.backing_file}")
    if isinstance(options.backing_fmt, str):
        words.append(f"backing_fmt={options.backing_fmt}")
    return ",".join(words)


def make_both(options: CreateOptions, folder: Path) -> tuple[Path, Path]:
    """(ours, theirs)."""
    one, other = folder / "ours.qcow2", folder / "theirs.qcow2"
    mine = theirs = options
    if options.data_file is not UNSET:
        mine = msgspec.structs.replace(options, data_file=str(folder / "ours.data"))
        theirs = msgspec.structs.replace(options, data_file=str(folder / "theirs.data"))
    asyncio.run(create_file(str(one), mine))
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", legacy(theirs), other, str(options.size))
    return one, other


def picture(path: Path, *, backing: bool = False) -> dict[str, Any]:
    """What qemu-img says of the image, without names and places."""
    info = json.loads(qemu_img("info", "--output=json", path))
    data = info["format-specific"]["data"]
    data.pop("data-file", None)
    found: dict[str, Any] = {
        "data": data,
        "size": info["virtual-size"],
        "cluster": info["cluster-size"],
        "backing": (info.get("backing-filename"), info.get("backing-filename-format")),
    }
    if not backing:
        check = json.loads(qemu_img("check", "--output=json", path))
        for name in ("filename", "image-end-offset", "fragmented-clusters"):
            check.pop(name, None)
        found["check"] = check
        keys = ("depth", "present", "data", "zero") if path.stat().st_size else ()
        extents = json.loads(qemu_img("map", "--output=json", path))
        # Whether a data cluster reads as a hole is the host file system's business.
        found["map"] = sorted({tuple(extent[key] for key in keys if key != "zero") for extent in extents})
    return found


MATRIX = [
    CreateOptions(size=size, version=version, cluster_size=cluster, preallocation=mode, refcount_bits=bits)
    for size, version, cluster, mode, bits in itertools.product(
        (0, 512, 5 * MIB), Version, (512, 65536), (Preallocation.OFF, Preallocation.METADATA), (1, 16, 64)
    )
    if version is Version.V3 or bits == 16
]
MATRIX += [
    CreateOptions(size=MIB, preallocation=Preallocation.FALLOC),
    CreateOptions(size=MIB, preallocation=Preallocation.FULL),
    CreateOptions(size=MIB, lazy_refcounts=True, compression_type=CompressionType.ZSTD),
    CreateOptions(size=5 * MIB, cluster_size=2 * MIB),
    CreateOptions(size=64 * MIB, extended_l2=True, cluster_size=16384, preallocation=Preallocation.METADATA),
    CreateOptions(size=MIB, data_file="x"),
    CreateOptions(size=MIB, data_file="x", data_file_raw=True),
    CreateOptions(size=MIB, data_file="x", preallocation=Preallocation.FALLOC),
    CreateOptions(size=MIB, data_file="x", preallocation=Preallocation.METADATA, extended_l2=True),
    CreateOptions(size=1 << 40),
    CreateOptions(size=1 << 33, cluster_size=512),
]


@pytest.mark.parametrize("options", MATRIX, ids=legacy)
def test_creates_what_qemu_img_creates(options: CreateOptions, tmp_path: Path) -> None:
    one, other = make_both(options, tmp_path)
    assert picture(one) == picture(other)
    if isinstance(options.data_file, str):
        assert (tmp_path / "ours.data").stat().st_size == (tmp_path / "theirs.data").stat().st_size
    elif options.cluster_size == 65536 and options.size <= 5 * MIB and options.preallocation is Preallocation.OFF:
        assert one.read_bytes() == other.read_bytes()


def test_overlay_records_backing_file_and_format(tmp_path: Path) -> None:
    options = CreateOptions(size=MIB, backing_file="no/such/base.qcow2", backing_fmt="qcow2")
    one, other = make_both(options, tmp_path)
    assert picture(one, backing=True) == picture(other, backing=True)
    assert picture(one, backing=True)["backing"] == ("no/such/base.qcow2", "qcow2")


REFUSED = {
    "cluster size no power": CreateOptions(size=MIB, cluster_size=1000),
    "cluster size 0": CreateOptions(size=MIB, cluster_size=0),
    "cluster size small": CreateOptions(size=MIB, cluster_size=256),
    "cluster size large": CreateOptions(size=MIB, cluster_size=4 * MIB),
    "extended small": CreateOptions(size=MIB, cluster_size=8192, extended_l2=True),
    "extended v2": CreateOptions(size=MIB, version=Version.V2, extended_l2=True),
    "lazy v2": CreateOptions(size=MIB, version=Version.V2, lazy_refcounts=True),
    "refcount 8 v2": CreateOptions(size=MIB, version=Version.V2, refcount_bits=8),
    "refcount 3": CreateOptions(size=MIB, refcount_bits=3),
    "refcount 0": CreateOptions(size=MIB, refcount_bits=0),
    "refcount 128": CreateOptions(size=MIB, refcount_bits=128),
    "data file v2": CreateOptions(size=MIB, version=Version.V2, data_file="d"),
    "raw without data file": CreateOptions(size=MIB, data_file_raw=True),
    "zstd v2": CreateOptions(size=MIB, version=Version.V2, compression_type=CompressionType.ZSTD),
    "backing and preallocation": CreateOptions(
        size=MIB, backing_file="b", backing_fmt="raw", preallocation=Preallocation.METADATA
    ),
    "backing and raw": CreateOptions(size=MIB, backing_file="b", backing_fmt="raw", data_file="d", data_file_raw=True),
    "format without backing": CreateOptions(size=MIB, backing_fmt="raw"),
    "too large": CreateOptions(size=1 << 40, cluster_size=512),
    "name too long": CreateOptions(size=MIB, backing_file="x" * 1024, backing_fmt="raw"),
    "name does not fit": CreateOptions(size=MIB, cluster_size=512, backing_file="x" * 600, backing_fmt="raw"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_qemus_and_touch_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = REFUSED[name]
    done = run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", legacy(options), "theirs", str(options.size)], expect=1
    )
    existing = tmp_path / "ours"
    existing.write_bytes(b"precious")
    with pytest.raises(BlockError) as caught:
        asyncio.run(create_file("ours", options))
    assert str(caught.value) in done.stderr.replace("qemu-img: theirs: ", "")
    assert existing.read_bytes() == b"precious"


def test_size_must_be_sectors() -> None:
    with pytest.raises(BlockError, match=r"^Image size must be a multiple of 512 bytes$"):
        check_options(CreateOptions(size=1000))


def test_a_creation_cut_short_leaves_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    with PlainFile(path, record=True) as file:
        asyncio.run(create(file, CreateOptions(size=MIB, preallocation=Preallocation.METADATA)))
        events = file.events
    last = max(at for at, event in enumerate(events) if event is not None)
    assert events[last] is not None
    assert events[last - 1] is None, "a flush goes before the header"
    assert events[-1] is None, "and one after it"
    for cut in range(last):
        image = bytearray()
        for event in events[:cut]:
            if event is not None:
                offset, data = event
                image.extend(bytes(max(offset + len(data) - len(image), 0)))
                image[offset : offset + len(data)] = data
        assert not probe(bytes(image[:512]))


def test_an_existing_file_is_overwritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(os.urandom(3 * MIB))
    asyncio.run(create_file(str(path), CreateOptions(size=MIB, preallocation=Preallocation.METADATA)))
    qemu_img("check", path)
    copy = tmp_path / "copy"
    qemu_img("convert", "-O", "raw", path, copy)
    assert copy.read_bytes() == bytes(MIB)


def test_an_image_in_use_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    before = path.read_bytes()
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        assert user.stdin is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        with pytest.raises(LockError):
            asyncio.run(create_file(str(path), CreateOptions(size=MIB)))
        user.stdin.close()
        user.wait(10)
    assert path.read_bytes() == before
