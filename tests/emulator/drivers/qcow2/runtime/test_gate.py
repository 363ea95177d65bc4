"""What an image's header may open: only what it names, in the format that it records."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from kit.peers import run
from kit.qcow2_disk import file_options, opened
from kit.qemu import create, qemu_img
from livedisk.emulator.block.gate import looks_like
from livedisk.emulator.block.options import BlockdevOptions
from livedisk.emulator.errors import BlockError, LiveDiskError

SIZE = 1 << 20


def overlay(folder: Path, name: str, fmt: str | None, *, size: int = SIZE) -> Path:
    path = folder / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", fmt or "raw", path, str(size))
    if not fmt:  # qemu-img insists on a format: make its extension one that nobody knows
        raw = path.read_bytes()
        at = raw.index(b"\xe2\x79\x2a\xca")
        path.write_bytes(raw[:at] + b"\xe2\x79\x2a\xcb" + raw[at + 4 :])
    return path


async def start_of(path: Path, length: int = 8, **options: object) -> bytes:
    async with opened(path, **options) as disk:
        return await disk.read(0, length)


def refused(path: Path, **options: object) -> LiveDiskError:
    with pytest.raises(BlockError) as caught:
        asyncio.run(start_of(path, **options))
    return caught.value


def test_a_relative_name_stands_beside_the_image_not_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.raw").write_bytes(b"beside!!" * (SIZE // 8))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "base.raw").write_bytes(b"wrong!!!" * (SIZE // 8))
    monkeypatch.chdir(elsewhere)
    assert asyncio.run(start_of(overlay(tmp_path, "base.raw", "raw"))) == b"beside!!"


def test_a_raw_disk_that_a_guest_made_look_like_qcow2_stays_raw(tmp_path: Path) -> None:
    create(tmp_path / "secret.qcow2", SIZE)
    (tmp_path / "base.raw").write_bytes((tmp_path / "secret.qcow2").read_bytes().ljust(SIZE, b"\0"))
    assert asyncio.run(start_of(overlay(tmp_path, "base.raw", "raw"), 4)) == b"QFI\xfb"


def test_without_a_recorded_format_content_that_looks_like_one_is_refused_with_the_way_out(tmp_path: Path) -> None:
    create(tmp_path / "base", SIZE)
    error = refused(overlay(tmp_path, "base", None))
    assert "is not recorded in the image, and its content looks like qcow2" in str(error)
    assert "qemu-img rebase -u" in error.hint
    assert "backing.driver" in error.hint


def test_without_a_recorded_format_plain_data_is_raw(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"plaintxt" * (SIZE // 8))
    assert asyncio.run(start_of(overlay(tmp_path, "base", None))) == b"plaintxt"


@pytest.mark.parametrize("name", ["ftp://localhost/x", "http://localhost/x", "foo:bar"])
def test_a_protocol_that_is_not_known_is_named(name: str, tmp_path: Path) -> None:
    protocol = name.partition(":")[0]
    error = refused(overlay(tmp_path, name, "raw"))
    assert str(error) == f"Could not open backing file: Unknown protocol '{protocol}'"


def test_a_missing_backing_file_is_named_as_qemu_names_it(tmp_path: Path) -> None:
    error = refused(overlay(tmp_path, "gone.raw", "raw"))
    gone = tmp_path / "gone.raw"
    assert str(error) == f"Could not open backing file: Could not open '{gone}': No such file or directory"


def test_a_format_that_is_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    path = overlay(tmp_path, "base", "raw")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"\0\0\0\3raw\0", b"\0\0\0\3odd\0", 1))
    assert "Unknown driver 'odd'" in str(refused(path))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_in_a_chain_is_refused(length: int, tmp_path: Path) -> None:
    names = [f"image{number}.qcow2" for number in range(length)]
    for number, name in enumerate(names):
        create(tmp_path / name, SIZE)
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", names[(number + 1) % length], tmp_path / name)
    assert "already in use above in its own backing chain (a loop)" in str(refused(tmp_path / names[0]))


def test_a_loop_through_a_link_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)
    os.symlink(path, tmp_path / "link.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "link.qcow2", path)
    assert "(a loop)" in str(refused(path))


def test_backing_null_opens_no_backing_file(tmp_path: Path) -> None:
    path = overlay(tmp_path, "gone.raw", "raw")
    assert asyncio.run(start_of(path, backing=None)) == bytes(8)


def test_the_users_backing_file_wins_over_the_headers(tmp_path: Path) -> None:
    (tmp_path / "other.raw").write_bytes(b"options!" * (SIZE // 8))
    path = overlay(tmp_path, "gone.raw", "raw")
    assert asyncio.run(start_of(path, backing=file_options(tmp_path / "other.raw"))) == b"options!"


def test_a_backing_file_ends_before_its_overlay(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"short!!!" * 100)
    path = overlay(tmp_path, "base.raw", "raw")

    async def read() -> bytes:
        async with opened(path) as disk:
            return await disk.read(512, 1024)

    assert asyncio.run(read()) == (b"short!!!" * 36).ljust(1024, b"\0")


def test_a_json_name_is_parsed_by_the_daemons_parser(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"fromjson" * (SIZE // 8))
    path = overlay(tmp_path, 'json:{"driver":"file","filename":"%s"}' % (tmp_path / "base.raw"), "raw")
    assert "json: filenames are not available here" in str(refused(path))

    async def read() -> bytes:
        from livedisk.emulator.block.graph import Graph

        def parse(options: dict[str, object]) -> BlockdevOptions:
            assert options["driver"] == "file"
            return file_options(Path(str(options["filename"])))

        before = Graph.__init__

        def init(self: Graph) -> None:
            before(self)
            self.parse_options = parse

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Graph, "__init__", init)
            return await start_of(path)

    assert asyncio.run(read()) == b"fromjson"


def test_what_qemu_probes_is_recognised(tmp_path: Path) -> None:
    for fmt in ("qcow2", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels"):
        path = tmp_path / f"image.{fmt}"
        done = run(["qemu-img", "create", "-q", "-f", fmt, path, "1M"], expect=None)
        if done.returncode == 0:
            assert looks_like(path.read_bytes()[:512]) == fmt
    assert looks_like(bytes(512)) is None
