"""Other people's clients on our server: libnbd, nbdinfo, nbdcopy, qemu-img, qemu-io and fio."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.fio import fio
from kit.libnbd import nbdcopy, nbdinfo, nbdinfo_list, nbdinfo_map, script
from kit.places import pattern
from kit.qemu import qemu_img, qemu_io

from .conftest import Served

DATA = pattern(3 << 20)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def image(served: Served, request: pytest.FixtureRequest) -> Served:
    """An export of 8 MiB with 3 MiB of data at 1 MiB, on the fast and on the slow path."""
    export = served.export(8 << 20, fast=request.param, description="a disk")
    export.fill(1 << 20, DATA)
    return served


def test_nbdinfo(image: Served) -> None:
    image.export(4096, "second", read_only=True)
    info = nbdinfo(image.uri())
    assert info["export-size"] == 8 << 20
    assert info["description"] == "a disk"
    assert info["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    for ability in ("multi_conn", "flush", "fua", "trim", "zero", "fast_zero", "cache", "df"):
        assert info[f"can_{ability}"] is True
    assert tuple(info[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")) == (1, 4096, 32 << 20)
    assert [export["export-name"] for export in nbdinfo_list(image.uri())] == ["", "second"]
    assert [export["is_read_only"] for export in nbdinfo_list(image.uri())] == [False, True]


def test_nbdinfo_map(image: Served) -> None:
    extents = [(extent["offset"], extent["length"], extent["type"]) for extent in nbdinfo_map(image.uri())]
    assert extents == [(0, 1 << 20, 3), (1 << 20, 3 << 20, 0), (4 << 20, 4 << 20, 3)]
    depth = nbdinfo_map(image.uri(), "qemu:allocation-depth")
    assert [extent["type"] for extent in depth] == [0, 1, 0]


def test_nbdcopy_both_ways(image: Served, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    nbdcopy(image.uri(), str(copy))
    expected = bytes(1 << 20) + DATA + bytes(4 << 20)
    assert copy.read_bytes() == expected
    target = image.export(8 << 20, "target")
    target.fill(0, b"old" * 100)
    nbdcopy(str(copy), image.uri("target"))
    assert target.data == expected
    target.fill(0, b"old" * 100)
    nbdcopy(image.uri(), image.uri("target"), "--connections=4", "--requests=64")
    assert target.data == expected


def test_qemu_img_converts_and_compares(image: Served, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", image.uri(), copy)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", copy, image.uri())
    target = image.export(8 << 20, "target")
    qemu_img("convert", "-n", "-f", "qcow2", "-O", "raw", "-W", "-m", "16", copy, image.uri("target"))
    assert target.data == bytes(1 << 20) + DATA + bytes(4 << 20)


def test_qemu_io(image: Served) -> None:
    qemu_io(
        image.uri(),
        "write -P 7 5M 3000000",
        "read -P 7 5M 3000000",
        "aio_write -P 8 0 2M",
        "aio_write -P 9 2M 2M",
        "aio_flush",
        "read -P 8 0 2M",
        "read -P 9 2M 2M",
        "write -f -P 1 513 1025",
        "read -P 1 513 1025",
        "write -z 0 1M",
        "write -z -u 1M 1M",
        "read -P 0 0 2M",
        "discard 2M 1M",
        "flush",
        format="raw",
    )


def test_libnbd_uses_everything(image: Served) -> None:
    result = script(
        image.uri(),
        """
        h.pwrite(b"x" * 70000, 3, nbd.CMD_FLAG_FUA)
        assert h.pread(70000, 3) == b"x" * 70000
        h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
        h.trim(4096, 4096, nbd.CMD_FLAG_FUA)
        h.cache(65536, 0)
        h.flush()
        assert h.pread(12288, 0) == bytes(12288)
        chunks = []
        edge = (1 << 20) - 8192
        h.pread_structured(12288, edge, lambda *chunk: chunks.append(chunk[1:3]), nbd.CMD_FLAG_DF)
        assert chunks == [(edge, nbd.READ_DATA)]
        found = []
        one = nbd.CMD_FLAG_REQ_ONE
        h.block_status(8 << 20, 0, lambda name, offset, entries, error: found.append((name, entries)))
        h.block_status(8 << 20, 0, lambda name, offset, entries, error: found.append((name, entries)), one)
        errors = []
        h.set_strict_mode(0)
        for attempt in (
            lambda: h.pread(512, 8 << 20),
            lambda: h.pwrite(b"x" * 512, (8 << 20) - 1),
            lambda: h.pwrite(b"x", 0, nbd.CMD_FLAG_DF),
        ):
            try:
                attempt()
                errors.append(0)
            except nbd.Error as error:
                errors.append(error.errnum)
        result = {"found": found, "errors": errors, "structured": h.get_structured_replies_negotiated()}
        """,
        contexts=["base:allocation", "qemu:allocation-depth"],
    )
    assert result["structured"]
    assert result["errors"] == [22, 28, 22]
    names = [name for name, _ in result["found"]]
    assert names == ["base:allocation", "qemu:allocation-depth"] * 2
    assert [len(entries) for _, entries in result["found"]][2:] == [2, 2]
    assert sum(result["found"][0][1][::2]) == 8 << 20


def test_libnbd_without_structured_replies(image: Served) -> None:
    script(
        image.uri(),
        """
        assert not h.get_structured_replies_negotiated()
        h.pwrite(b"y" * 300000, 100)
        assert h.pread(300002, 99)[1:-1] == b"y" * 300000
        """,
        before="h.set_request_structured_replies(False)",
    )


def test_libnbd_with_export_name(image: Served) -> None:
    # No full info means that libnbd ends negotiation with what it can; old handshake flags mean EXPORT_NAME.
    script(image.uri(), "assert h.pread(5, 1 << 20) is not None", before="h.set_handshake_flags(0)")


def test_libnbd_many_requests_in_flight(image: Served) -> None:
    script(
        image.uri(),
        """
        cookies = []
        for i in range(500):
            buffer = nbd.Buffer.from_bytearray(bytearray([i % 256]) * 8192)
            cookies.append(h.aio_pwrite(buffer, i * 8192))
            if i % 50 == 0:
                cookies.append(h.aio_flush())
        while h.aio_in_flight():
            h.poll(-1)
        for cookie in cookies:
            assert h.aio_command_completed(cookie)
        for i in range(500):
            assert h.pread(8192, i * 8192) == bytes([i % 256]) * 8192
        """,
    )


@pytest.mark.parametrize("size", ["4k", "128k", "1m"])
def test_fio_verifies_what_it_wrote(image: Served, tmp_path: Path, size: str) -> None:
    fio(
        image.uri(),
        tmp_path,
        rw="randrw",
        bs=size,
        iodepth=16,
        size="8m",
        loops=3,
        verify="crc32c",
        verify_async=0,
        do_verify=1,
    )


def test_fio_with_several_connections(image: Served, tmp_path: Path) -> None:
    fio(
        image.uri(),
        tmp_path,
        rw="randwrite",
        bs="4k",
        iodepth=8,
        numjobs=4,
        size="2m",
        offset_increment="2m",
        verify="crc32c",
        do_verify=1,
    )
