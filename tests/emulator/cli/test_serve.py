"""``livedisk serve``: what it prints, what it takes an image for, and how it ends."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from kit.livedisk import Serve, executable, livedisk
from kit.peers import run
from kit.places import pattern, write_file
from kit.process import Process
from kit.qemu import check, create, qemu_img, qemu_io, read_all
from kit.qmp import QmpError
from livedisk.emulator.cli.images import choose_format
from livedisk.emulator.errors import LiveDiskError

DATA = pattern(1 << 20)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_file(tmp_path / "disk.raw", DATA)


def size_of(uri: str) -> int:
    return int(run(["nbdinfo", "--size", uri]).stdout)


def test_it_prints_the_uri_and_how_to_use_it(raw: Path, short_path: Path) -> None:
    with Serve(short_path, raw, format="raw") as served:
        assert size_of(served.uri) == len(DATA)
        served.wait_for_output(served.uri)
        output = served.output()
        assert output.startswith(f"Serving {raw} (raw, {len(DATA)} bytes):\n\n    {served.uri}\n")
        assert all(word in output for word in ("nbdcopy", "qemu-nbd", "qemu-system-x86_64", "livedisk qmp"))
        served.stop(expect=0)
    assert list(short_path.glob("*.nbd")) == list(short_path.glob("*.qmp")) == []


def test_the_commands_it_prints_work(raw: Path, short_path: Path) -> None:
    with Serve(short_path, raw, format="raw") as served:
        served.wait_for_output("nbdcopy")
        found = re.search(r"copy +(nbdcopy .*) copy\.raw", served.output())
        assert found is not None
        run(["sh", "-c", f"{found[1]} {short_path}/copy.raw"])
        assert (short_path / "copy.raw").read_bytes() == DATA


def test_a_port_that_the_kernel_chose_is_printed(raw: Path, short_path: Path) -> None:
    arguments = [executable(), "serve", str(raw), "-f", "raw", "--port", "0", "--bind", "127.0.0.1"]
    with Process(arguments, log=short_path / "log") as served:
        served.wait_for_output("nbd://")
        found = re.search(r"nbd://127\.0\.0\.1:\d+", served.output())
        assert found is not None
        assert size_of(found[0]) == len(DATA)


def test_without_a_place_it_makes_one_and_removes_it(raw: Path, short_path: Path) -> None:
    with Process([executable(), "serve", str(raw)], log=short_path / "log") as served:
        served.wait_for_output("Ctrl-C ends it.")
        found = re.search(r"nbd\+unix:\S+socket=(\S+)$", served.output(), re.MULTILINE)
        assert found is not None
        assert size_of(found[0].strip("'")) == len(DATA)
        served.signal(signal.SIGINT)
        served.wait(expect=0)
        assert not Path(found[1]).parent.exists()


def test_read_only_refuses_writes(raw: Path, short_path: Path) -> None:
    with Serve(short_path, raw, "--read-only", format="raw") as served:
        qemu_io(served.uri, "write 0 4k", format="raw", expect=1)
        qemu_io(served.uri, "read 0 4k", format="raw", options=["-r"])
    assert raw.read_bytes() == DATA


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_snapshot_takes_writes_and_drops_them(fmt: str, tmp_path: Path, short_path: Path) -> None:
    image = tmp_path / f"disk.{fmt}"
    if fmt == "raw":
        write_file(image, DATA)
    else:
        qemu_io(create(image, len(DATA)), "write -P 7 64k 64k")
    before = image.read_bytes()
    with Serve(short_path, image, "--snapshot", format=fmt) as served:
        qemu_io(served.uri, "write -P 9 0 128k", "read -P 9 0 128k", format="raw")
        served.stop(expect=0)
    assert image.read_bytes() == before


def test_the_image_is_complete_after_a_signal(tmp_path: Path, short_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "16M", options="lazy_refcounts=on")
    with Serve(short_path, image) as served:
        qemu_io(served.uri, "write -P 3 1M 1M", format="raw")
        served.stop(expect=0)
    check(image)
    assert read_all(image, tmp_path)[1 << 20 : 2 << 20] == b"\3" * (1 << 20)


def test_qmp_controls_what_is_served(tmp_path: Path, short_path: Path) -> None:
    image = create(tmp_path / "disk.qcow2", "16M")
    from kit.qmp import Qmp

    with Serve(short_path, image) as served, Qmp(served.qmp_socket) as qmp:
        qemu_io(served.uri, "write -P 3 0 1M", format="raw")
        overlay = tmp_path / "over.qcow2"
        qmp.execute("blockdev-snapshot-sync", node_name="disk", snapshot_file=str(overlay), snapshot_node_name="over")
        qemu_io(served.uri, "read -P 3 0 1M", "write -P 4 0 1M", format="raw")
        with pytest.raises(QmpError, match="is busy"):
            qmp.execute("block_resize", node_name="disk", size=1 << 20)
        qmp.execute("quit")
        served.wait(expect=0)
    assert read_all(image, tmp_path)[: 1 << 20] == b"\3" * (1 << 20)
    assert read_all(overlay, tmp_path)[: 1 << 20] == b"\4" * (1 << 20)


# -- which format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "header", "answer"),
    [
        ("disk.qcow2", "plain", "qcow2"),
        ("disk.img", "plain", "qcow2"),
        ("disk.qcow2", "backing", "qcow2"),
        ("disk.img", "backing", None),
        ("disk.img", "data file", None),
        ("disk.qcow2", "data file", "qcow2"),
        ("disk.img", "none", "raw"),
        ("disk.img", "empty", "raw"),
        ("disk.qcow2", "none", None),
        ("disk.img", "damaged", "error"),
    ],
)
def test_a_header_is_believed_as_far_as_it_can_do_no_harm(
    name: str, header: str, answer: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    if header == "plain":
        create(path, "1M")
    elif header == "backing":
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", path, "1M")
    elif header == "data file":
        create(path, "1M", options=f"data_file={tmp_path / 'data'}")
    elif header == "damaged":
        path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(1 << 16, b"\xff"))
    else:
        path.write_bytes(b"" if header == "empty" else bytes(1 << 16))
    if answer in ("qcow2", "raw"):
        assert choose_format(str(path)) == answer
        return
    with pytest.raises(LiveDiskError) as refused:
        choose_format(str(path))
    assert ("-f" in str(refused.value)) is (answer is None)


def test_a_header_that_a_guest_wrote_discloses_nothing(tmp_path: Path, short_path: Path) -> None:
    disk = write_file(tmp_path / "disk.raw", b"", size=1 << 20)
    secret = write_file(tmp_path / "secret", b"top secret".ljust(512))
    with Serve(short_path, disk, format="raw") as served:
        forged = tmp_path / "forged"
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", forged, "512")
        run(["nbdcopy", forged, served.uri])
        served.stop(expect=0)
    refused = livedisk("serve", disk, "--socket", f"{short_path}/n", expect=1)
    assert "A guest could have written it into a raw disk" in refused.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["missing.raw"], 1, "livedisk serve: missing.raw: No such file or directory"),
        (["/dev/null", "-f", "nonsense"], 2, "-f nonsense: no such format; there are "),
        (["x", "--socket", "a", "--port", "1"], 2, "choose one"),
        (["x", "--snapshot", "--read-only"], 2, "choose one"),
        (["x", "--nonsense"], 2, "No such option"),
        ([], 2, "Missing argument"),
    ],
)
def test_what_cannot_be_served_is_said(words: list[str], code: int, text: str) -> None:
    assert text in livedisk("serve", *words, expect=code).stderr


def test_an_image_of_another_format_is_named(tmp_path: Path) -> None:
    image = write_file(tmp_path / "disk.raw", b"", size=1 << 16)
    said = livedisk("serve", image, "-f", "qcow2", expect=1).stderr
    assert said == f"livedisk serve: {image}: Image is not in qcow2 format\n"


def test_help_says_what_a_user_needs() -> None:
    text = livedisk("serve", "--help").stdout
    assert all(word in text for word in ("--snapshot", "--read-only", "Exit status", "Examples"))
