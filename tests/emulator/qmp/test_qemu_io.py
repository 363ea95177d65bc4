"""The human monitor's qemu-io: the same lines as QEMU's, but for the times; and what QEMU's would hang on or die of.

Differences that are meant: what getopt(3) says of an unknown option is left to the usage line; access to the VM state, abort,
sigraise and the zone commands are refused or unknown.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kit.livedisk import Daemon
from kit.qemu import create, qemu_img
from kit.qmp import Qmp, QmpError
from kit.side_by_side import MACHINE, Host, Human, Step, compare

NODES = [
    *("-blockdev", "qcow2,node-name=a,file.driver=file,file.node-name=af,file.filename=a.qcow2"),
    *("-blockdev", "raw,node-name=r,file.driver=file,file.filename=r.raw"),
    *("-blockdev", "raw,node-name=ro,read-only=on,file.driver=file,file.filename=ro.raw"),
    *("-blockdev", "null-co,node-name=n"),
    *("-blockdev", "qcow2,node-name=d,file.driver=file,file.filename=d.qcow2"),
    *("-blockdev", "raw,node-name=l,file.driver=file,file.filename=d.qcow2"),
    *("-blockdev", "blkdebug,node-name=bn,image.driver=null-co"),
    *("-device", "virtio-blk-pci,drive=d,id=virtio0"),
]


def images(folder: Path) -> None:
    base = create(folder / "base.qcow2", "4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", folder / "a.qcow2", "4M")
    create(folder / "d.qcow2", "4M")
    for name in ("r", "ro"):
        create(folder / f"{name}.raw", "4M", format="raw")
    (folder / "pattern").write_bytes(b"abc")


def at(node: str, *commands: str) -> list[Step]:
    return [Human(f'qemu-io {node} "{command}"') for command in commands]


SCRIPTS: dict[str, list[Step]] = {
    "an image that somebody writes to": [
        *at("l", "write 0 512", "discard 0 512", "read 0 512", "length"),
        ("query-named-block-nodes", {"flat": True}),
    ],
    "read and write": at(
        "a",
        "write -P 0x11 0 64k",
        *("read -P 0x11 0 64k", "read -P 0x12 0 64k", "read -v 0 40", "read -vP 0x11 -s 16 -l 16 0 64", "read -q 0 1"),
        *("read -P 17 0 1", "read -P 021 0 1", "read -P 0x100 0 1", "read 0 64k -P 0x12", "read -C 0 64k", "read 0 0"),
        *("write 4M 64k", "read 4M 64k", "write 3M 2M", "write -z 1M 64k", "write -zu 1M 64k", "write -c 2M 64k"),
        *(
            "write -f 2M 64k",
            "write -z -n 2M 64k",
            "write -z -f 1 5",
            "write -c 1 5",
            "write -r 2M 64k",
            "write -q 2M 64k",
        ),
        *("write 100 100", "read -v 96 32", "write -s pattern 0 7", "read -v 0 16", "write -s none 0 1k"),
        *(
            "write abc 100",
            "write 0 abc",
            "write 0 1.5k",
            "write 0 1.5k3",
            "write 0 99999999999999999999",
            "write 0 4G",
        ),
        *(
            "write -P 300 0 512",
            "write 0 8E",
            "read 0 4G",
            "read -s 4k 0 64k",
            "read -P 1 -s 4k -l 64k 0 64k",
            "read 1 2 3",
        ),
        *(
            "write -u 0 64k",
            "write -n 0 64k",
            "write -z -P 3 0 64k",
            "write -fc 0 64k",
            "write -bz 0 512",
            "write  -P  3   0  1",
        ),
    ),
    "vectors and asynchronous requests": at(
        "a",
        *(
            "writev -P 7 0 1k 2k 512",
            "readv -P 7 0 1k 2k 512",
            "readv -P 8 0 1k",
            "readv -v -P 7 0 16 16",
            "readv -q 0 1",
        ),
        *("writev 0 4G", "writev 0 1x", "writev 0 1G 1G 1G", "readv -P 300 0 1", "writev -C 0 64k", "writev -f 0 1k"),
        *("readv 16M 64k", "writev 16M 64k"),
        # When an aio_ request prints is up to the disk, unless it is waited for.
        *("aio_write -P 3 0 64k", "aio_flush", "aio_read -P 3 0 64k", "aio_flush", "aio_read -P 4 0 64k", "aio_flush"),
        *(
            "aio_read -v 0 16",
            "aio_flush",
            "flush",
            "aio_write -z 0 64k 64k",
            "aio_write -u 0 64k",
            "aio_write -i 0 64k",
        ),
        *("aio_read -i 0 64k", "aio_flush", "aio_read 16M 64k", "aio_flush", "aio_write 16M 64k", "aio_flush"),
        *("aio_read -q 0 64k", "aio_flush"),
    ),
    "the image": [
        *at(
            "a",
            "write 0 64k",
            "write 1M 64k",
            "discard 0 64k",
            "discard 100 64k",
            "discard 16M 64k",
            "discard -C 0 64k",
        ),
        *at(
            "a",
            "discard -q 0 64k",
            "map",
            "alloc 0",
            "alloc 0 4M",
            "alloc 1M 64k",
            "alloc 16M 64k",
            "alloc 1 3",
            "alloc 1x",
        ),
        *at("a", "info", "length", "truncate 8M", "length", "truncate abc", "truncate -m foo 8M", "truncate 100"),
        *at("a", "truncate -m falloc 9M", "length", "map"),
        *at("r", "info", "length", "map", "write 0 1k", "truncate 5M", "length", "alloc 0"),
        *at("af", "info", "read 0 4"),
        *at("n", "length", "read 0 4k", "write 0 4k", "discard 0 4k"),
    ],
    "who may": [
        *at(
            "ro",
            "write 0 512",
            "read 0 512",
            "flush",
            "discard 0 512",
            "truncate 1M",
            "writev 0 512",
            "aio_write 0 512",
        ),
        *at("d", "write 0 512", "read 0 512"),
        # When an aio_ request prints is up to the disk, unless it is waited for.
        *at("-d virtio0/virtio-backend", "write -P 1 0 512", "read -P 1 0 512", "aio_write -P 2 0 512", "aio_flush"),
        *at("-d virtio0/virtio-backend", "aio_read 0 1k", "aio_flush"),
        *at("-d virtio0/virtio-backend", "aio_read -i 0 1k", "aio_write -i 0 1k", "aio_read 8M 1k", "aio_flush"),
        *at("-d /machine/peripheral/virtio0/virtio-backend", "read -P 2 0 512"),
        *at("-d zz", "read 0 512"),
        *at("zz", "read 0 512"),
        Host(lambda folder: (folder / "d.qcow2").stat().st_size > 0),
        Human("qemu-io a"),
        Human("qemu-io"),
        Human('qemu-io -x a "read 0 1"'),
        Human('qemu-io a "read 0 1" x'),
        Human('qemu-io a "read 0 1'),
        Human('qemu-io a ""'),
        Human("help qemu-io"),
        *at("a", "reopen -r", "write 0 1k", "reopen -w", "write 0 1k"),
    ],
    "help": at(
        "a", *(f"help {name}" for name in ("read", "write", "readv", "writev", "aio_read", "aio_write", "discard"))
    ),
    "more help": at(
        "a",
        *(
            f"help {name}"
            for name in ("truncate", "map", "alloc", "sleep", "break", "resume", "reopen", "flush", "nope")
        ),
        *("sleep 1", "sleep abc", "break write_aio A", "resume A", "remove_break A"),
    ),
}


def printed(folder: Path) -> list[str]:
    """What the daemon printed, but for its log, and what getopt(3) and qemu-io say on standard error."""
    lines = (folder / "log").read_text().splitlines()
    others = re.compile(r"livedisk: |bad argument count|.*: invalid option --|command \"|unterminated string")
    return [line for line in lines if not others.match(line)]


def without_times(text: str) -> str:
    text = re.sub(r"[\d:.]+(?: sec)? \([^()]* ops/sec\)", "TIME", text)
    text = re.sub(r"(\d+,1),[\d:.]+,[\d.]+,[\d.]+", r"\1,TIME", text)
    # How long the file is in which an image stands is each one's own affair.
    text = text.replace("It is locked by this process.\\r\\n", "")  # we say more
    return re.sub(r'"wr_highest_offset": \d+', '"wr_highest_offset": 0', text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_printed_is_what_qemu_prints(name: str, tmp_path: Path) -> None:
    script, options = [*SCRIPTS[name], Host(printed)], [*MACHINE, *NODES]
    compare(tmp_path, script, prepare=images, options=options, even_out=without_times, events=False)


def said(qmp: Qmp, node: str, command: str) -> str:
    """What is printed: on the daemon's standard output, which is in its log."""
    log = Path(qmp.address).with_suffix(".log")  # type: ignore[arg-type]
    before = len(log.read_text())
    return qmp.human(f'qemu-io {node} "{command}"') + log.read_text()[before:]


def test_what_a_device_was_asked_is_in_its_statistics(short_path: Path) -> None:
    images(short_path)
    file = f"file.driver=file,file.filename={short_path / 'd.qcow2'}"
    options = ["-blockdev", f"qcow2,node-name=d,{file}", "-device", "virtio-blk,drive=d,id=virtio0"]
    with Daemon(short_path, *options, nbd=False) as daemon, daemon.qmp() as qmp:
        for command in (
            "aio_write 0 64k",
            "aio_read 0 4k",
            "aio_read -i 0 4k",
            "aio_write 99M 1k",
            "aio_flush",
            "read 0 1k",
        ):
            said(qmp, "-d virtio0", command)
        stats = qmp.execute("query-blockstats")[0]["stats"]
    names = ("wr_bytes", "rd_operations", "invalid_rd_operations", "failed_wr_operations", "flush_operations")
    assert [stats[name] for name in names] == [65536, 1, 1, 1, 1]


def test_a_request_that_a_breakpoint_holds_is_let_go(short_path: Path) -> None:
    images(short_path)
    file = f"file.driver=blkdebug,file.image.driver=file,file.image.filename={short_path / 'd.qcow2'}"
    with Daemon(short_path, "--blockdev", f"qcow2,node-name=d,{file}", nbd=False) as daemon, daemon.qmp() as qmp:
        assert said(qmp, "d", "break write_aio A") == ""
        assert said(qmp, "d", "aio_write -P 5 0 64k") == "blkdebug: Suspended request 'A'\n"
        assert said(qmp, "d", "wait_break A") == ""
        with pytest.raises(QmpError, match="is in use"):
            qmp.execute("blockdev-del", node_name="d")
        assert "wrote 65536/65536 bytes at offset 0" in said(qmp, "d", "resume A") + said(qmp, "d", "aio_flush")
        assert "Pattern" not in said(qmp, "d", "read -P 5 0 64k")
        assert said(qmp, "d", "resume A").startswith("Could not resume request: ")
        qmp.execute("blockdev-del", node_name="d")


def test_what_would_hang_or_kill_the_daemon_is_refused(short_path: Path) -> None:
    with Daemon(short_path, "--blockdev", "null-co,node-name=n", nbd=False) as daemon, daemon.qmp() as qmp:
        assert said(qmp, "n", "wait_break A") == "Could not wait for a breakpoint: Operation not supported\n"
        assert said(qmp, "n", "abort").startswith("abort: refused")
        assert said(qmp, "n", "sigraise 9").startswith("sigraise: refused")
        assert said(qmp, "n", "zz") == 'command "zz" not found\n'
        assert said(qmp, "n", "write") == "bad argument count 0 to write, expected at least 2 arguments\n"
        assert said(qmp, "n", "write -b 0 512").startswith("write failed: the VM state cannot be accessed")
        assert said(qmp, "n", "reopen -o cache.direct=on").startswith("reopen: only -r and -w are supported")
        assert said(qmp, "n", "write -Z 0 1").startswith("write [-bcCfnqruz]")


def test_a_held_request_does_not_keep_the_daemon_from_ending(short_path: Path) -> None:
    images(short_path)
    file = f"file.driver=blkdebug,file.image.driver=file,file.image.filename={short_path / 'd.qcow2'}"
    with Daemon(short_path, "--blockdev", f"qcow2,node-name=d,{file}", nbd=False) as daemon:
        with daemon.qmp() as qmp:
            said(qmp, "d", "break write_aio A")
            said(qmp, "d", "aio_write -P 5 0 64k")
            qmp.execute("quit")
        assert daemon.wait() == 0
