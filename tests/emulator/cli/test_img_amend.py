"""``livedisk img amend`` and ``img snapshot``: qemu-img's words, and images that it finds clean and unchanged in content."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from kit.crashdisk import Platter
from kit.livedisk import livedisk
from kit.peers import run
from kit.qemu import assert_same, check, create, info, qemu_img, qemu_io
from livedisk.emulator.drivers.qcow2.repair import change_refcount_width

AMENDMENTS = ["compat=0.10", "compat=1.1", "lazy_refcounts=on,size=8M", "refcount_bits=1", "refcount_bits=64"]
REFUSED = [
    "compat=foo", "lazy_refcounts=zz", "backing_file=", "backing_file=b,backing_fmt=raw", "cluster_size=4k", "extended_l2=on",
    "preallocation=full", "compression_type=zstd", "refcount_bits=7", "data_file=zz", "data_file_raw=on", "zz=3",
    "lazy_refcounts=on,compat=0.10", "refcount_bits=8,compat=0.10",
]  # fmt: skip


def image(folder: Path, options: str = "", *, snapshot: bool = False) -> Path:
    """An image of all kinds of clusters, over a backing file."""
    base = create(folder / "base.qcow2", "4M")
    qemu_io(base, "write -P 9 0 4M")
    path = create(folder / "image.qcow2", "5M", options=options, backing=base)
    qemu_io(path, "write -P 1 0 300k", "write -c -P 2 1M 64k", "write -P 3 2M 64k", "write -P 4 4M 100k")
    if "0.10" not in options and not snapshot:
        qemu_io(path, "write -z 3M 128k", "write -zu 2M 64k", "write -z 4500k 100k")
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, "write -P 5 0 100k")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("options", "snapshot"), [("", False), ("compat=0.10", True), ("cluster_size=4k", True)])
def test_images_are_amended_as_qemu_img_amends_them(options: str, snapshot: bool, tmp_path: Path) -> None:
    original = image(tmp_path, options, snapshot=snapshot)
    for wanted in AMENDMENTS:
        amended_alike(tmp_path, original, wanted)
        assert_same(tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2")
        if snapshot:
            for name in ("theirs", "ours"):
                qemu_img("convert", "-l", "one", "-O", "raw", tmp_path / f"{name}.qcow2", tmp_path / f"{name}.raw")
            assert (tmp_path / "theirs.raw").read_bytes() == (tmp_path / "ours.raw").read_bytes()


def amended_alike(folder: Path, original: Path, wanted: str) -> None:
    """Amend a copy with qemu-img and another with ours: the same exit code, message and image information; both clean."""
    answers = []
    for name in ("theirs", "ours"):
        path = folder / f"{name}.qcow2"
        shutil.copy(original, path)
        command = ["amend", "-f", "qcow2", "-o", wanted, path]
        done = run(["qemu-img", *command], expect=None) if name == "theirs" else livedisk("img", *command, expect=None)
        found = info(path)
        members = [found.get(member) for member in ("virtual-size", "backing-filename", "format-specific")]
        answers.append((done.returncode, done.stderr.partition(": ")[2], members))
        check(path)
    assert answers[0] == answers[1], wanted


@pytest.mark.parametrize("wanted", REFUSED)
def test_what_cannot_be_amended_is_refused_in_qemu_imgs_words(wanted: str, tmp_path: Path) -> None:
    amended_alike(tmp_path, create(tmp_path / "image.qcow2", "1M"), wanted)


def test_a_raw_data_file_need_not_stay_raw(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", "1M", options=f"data_file={tmp_path / 'x.raw'},data_file_raw=on")
    livedisk("img", "amend", "-o", "data_file_raw=off", path)
    assert info(path)["format-specific"]["data"]["data-file-raw"] is False
    done = livedisk("img", "amend", "-o", "compat=0.10", path, expect=1)
    assert "Cannot downgrade an image with a data file" in done.stderr
    check(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("extended_l2=on", "incompatible features"), ("refcount_bits=8", "compat=0.10 requires refcount_bits=16")],
)
def test_what_version_2_cannot_say_is_refused_before_anything_changes(
    options: str, reason: str, tmp_path: Path
) -> None:
    path = image(tmp_path, options)
    before = path.read_bytes()
    done = livedisk("img", "amend", "-o", "lazy_refcounts=off,compat=0.10", path, expect=1)
    assert reason in done.stderr
    assert path.read_bytes() == before


def test_a_snapshot_with_zero_clusters_keeps_an_image_at_version_3(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", "1M")
    qemu_io(path, "write -z 0 64k")
    qemu_img("snapshot", "-c", "one", path)
    done = livedisk("img", "amend", "-o", "compat=0.10", path, expect=1)
    assert "Internal snapshot 'one' has zero clusters" in done.stderr
    check(path)


class _Disk:
    """A platter as a file that is written to."""

    def __init__(self, platter: Platter) -> None:
        self.platter = platter
        self.left: list[bytes] = []

    @property
    def size(self) -> int:
        return len(self.platter.now)

    async def read(self, offset: int, view: memoryview) -> None:
        view[:] = bytes(self.platter.now[offset : offset + len(view)]).ljust(len(view), b"\0")

    async def write(self, offset: int, data: memoryview) -> None:
        self.left.append(self.platter.after_power_cut(random.Random(len(self.left)).randrange(1 << 30)))
        self.platter.write(offset, bytes(data))

    async def flush(self) -> None:
        self.left.append(self.platter.after_power_cut(len(self.left)))
        self.platter.flush()


@pytest.mark.parametrize("bits", [1, 64])
def test_a_power_cut_while_refcounts_change_width_leaks_at_most(bits: int, tmp_path: Path) -> None:
    path = image(tmp_path, "cluster_size=4k")
    qemu_io(path, "discard 1M 64k")  # several compressed clusters may share one: one bit could not count that
    disk = _Disk(Platter(path.read_bytes()))
    asyncio.run(change_refcount_width(disk, bits))
    for left in [*disk.left, bytes(disk.platter.now)]:
        cut = tmp_path / "cut.qcow2"
        cut.write_bytes(left)
        check(cut, leaks=True)
        assert_same(cut, path)
    assert info(cut)["format-specific"]["data"]["refcount-bits"] == bits


SNAPSHOTS = [
    ("-l",), ("-c", "s1"), ("-c", "s1"), ("-c", "s2"), ("-a", "zz"), ("-a", "s1"), ("-a", "3"), ("-d", "zz"), ("-d", "2"),
    ("-d", "s1"), ("-d", "s1"), ("-a", "s2"), ("-c", "a", "-d", "b"), ("-d", "s2"),
]  # fmt: skip


def test_snapshots_come_and_go_as_with_qemu_img(tmp_path: Path) -> None:
    paths = {}
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        paths[name] = image(tmp_path / name)
    for number, words in enumerate(SNAPSHOTS):
        told = []
        for name, path in paths.items():
            command = ["snapshot", *words, path]
            done = (
                run(["qemu-img", *command], expect=None) if name == "theirs" else livedisk("img", *command, expect=None)
            )
            told.append((done.returncode, [one.partition(": ")[2] for one in done.stderr.splitlines()[:1]]))
            qemu_io(path, f"write -P {number + 20} {number * 32}k 64k")
            told[-1] += ([(one["id"], one["name"]) for one in info(path).get("snapshots", [])],)  # type: ignore[operator]
            check(path)
        assert told[0] == told[1], words
        assert_same(*paths.values())
    listed = livedisk("img", "snapshot", paths["ours"]).stdout
    assert listed == ""
    livedisk("img", "snapshot", "-c", "last", paths["ours"])
    assert livedisk("img", "snapshot", "-l", paths["ours"]).stdout.splitlines()[0] == "Snapshot list:"
