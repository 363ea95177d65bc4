"""Descriptors passed to the daemon: named ones for sockets, sets for files, as QEMU takes them."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kit.libnbd import nbdinfo
from kit.livedisk import Daemon, executable
from kit.peers import run
from kit.places import short_folder
from kit.process import Process
from kit.qemu import create, qemu_img
from kit.qmp import Qmp, QmpError
from kit.side_by_side import Host, Human, Job, Passing, Step, compare, step


def opened(*flags: int, name: str = "a.raw") -> Callable[[Path], Sequence[int]]:
    return lambda folder: [os.open(folder / name, one | os.O_CREAT) for one in flags]


def add(number: int | None, *flags: int, name: str = "a.raw", **more: Any) -> Passing:
    arguments = more if number is None else {"fdset-id": number, **more}
    return Passing(opened(*flags, name=name), "add-fd", arguments)


def listening(folder: Path) -> Sequence[int]:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.path.relpath(folder / "passed"))
    return [sock.detach()]


def connected(folder: Path) -> Sequence[int]:
    return [end.detach() for end in socket.socketpair()]


def node(name: str, number: int | str, **more: Any) -> Step:
    return step("blockdev-add", driver="file", node_name=name, filename=f"/dev/fdset/{number}", **more)


def refused(image: Path) -> bool:
    """Whether somebody else, who writes, is told that the image is in use."""
    return "Failed to get" in run(["qemu-io", "-f", "raw", "-c", "write 0 512", image], expect=None).stderr


def channel(name: str) -> dict[str, Any]:
    return {"channel-type": "main", "addr": {"transport": "socket", "type": "fd", "str": name}}


RO, RW, WO = os.O_RDONLY, os.O_RDWR, os.O_WRONLY
LISTEN = {"type": "fd", "data": {"str": "l"}}
QUERY = step("query-fdsets")
SCRIPTS: dict[str, list[Step]] = {
    "names": [
        step("getfd", fdname="a"),
        step("closefd", fdname="a"),
        Passing(opened(RO), "getfd", {"fdname": "0a"}),
        Passing(opened(RO), "getfd", {"fdname": "a"}),
        Passing(opened(RO), "getfd", {"fdname": "a"}),
        step("closefd", fdname="a"),
        step("closefd", fdname="a"),
        Passing(opened(RO, RW), "getfd", {"fdname": "one-of-two"}),
        step("getfd", fdname="the-other"),
        step("closefd", fdname="one-of-two"),
        Passing(opened(RO), "query-name", {}),
        step("getfd", fdname="late"),
        step("closefd", fdname="late"),
        Human("getfd a"),
        Human("closefd a"),
    ],
    "sockets": [
        step("nbd-server-start", addr=LISTEN),
        step("nbd-server-start", addr={"type": "fd", "data": {"str": "5"}}),
        Passing(opened(RO), "getfd", {"fdname": "l"}),
        step("nbd-server-start", addr=LISTEN),
        step("closefd", fdname="l"),
        Passing(connected, "getfd", {"fdname": "l"}),
        step("nbd-server-start", addr=LISTEN),
        Passing(listening, "getfd", {"fdname": "l"}),
        step("nbd-server-start", addr=LISTEN),
        step("nbd-server-stop"),
        step("chardev-add", id="c", backend={"type": "socket", "data": {"addr": LISTEN, "server": False}}),
        Passing(connected, "getfd", {"fdname": "l"}),
        step("chardev-add", id="c", backend={"type": "socket", "data": {"addr": LISTEN, "server": False}}),
        step("chardev-remove", id="c"),
        Passing(connected, "getfd", {"fdname": "l"}),
        step("chardev-add", id="c", backend={"type": "socket", "data": {"addr": LISTEN, "server": True}}),
        step("blockdev-add", driver="nbd", node_name="n", server={"type": "fd", "str": "none"}),
        step("migrate", uri="fd:none"),
        *(
            step("migrate", **more)
            for more in (
                {"channels": []},
                {"channels": [channel("none")], "uri": "fd:none"},
                {"channels": [channel("none"), channel("none")]},
                {"channels": [channel("none")], "detach": True},
                {"uri": "fd:none", "resume": True},
            )
        ),
    ],
    "sets": [
        QUERY,
        step("add-fd"),
        step("add-fd", fdset_id=1),
        add(None, RO),
        add(None, RO, opaque="text"),
        add(7, RO, opaque="x:/y"),
        add(7, RW),
        add(-1, RW),
        add(3, RW, RO),
        QUERY,
        step("remove-fd", fdset_id=55),
        step("remove-fd", fdset_id=3, fd=999),
        step("remove-fd", fdset_id=3),
        QUERY,
        add(None, RO),
        step("remove-fd", fdset_id=2),
        QUERY,
    ],
    "files of sets": [
        add(0, RO),
        add(7, RO),
        add(7, RW),
        add(21, WO),
        *(node("f", number) for number in (99, 0, 21, "x", "7x", "")),
        node("f0", 0, read_only=True),
        node("f7", 7),
        QUERY,
        step("remove-fd", fdset_id=7),
        QUERY,
        node("g7", 7, read_only=True),
        step(
            "blockdev-reopen",
            options=[{"driver": "file", "node-name": "f7", "filename": "/dev/fdset/7", "read-only": True}],
        ),
        step("blockdev-del", node_name="f7"),
        QUERY,
        node("g7", 7),
        step("blockdev-del", node_name="f0"),
        QUERY,
        step("query-named-block-nodes", flat=True),
    ],
    "for reading and for writing": [
        add(1, RO),
        node("f", 1, auto_read_only=True),
        step("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd"}}),
        step("block-export-add", type="nbd", id="e", node_name="f", writable=True),
        add(1, RW),
        step("block-export-add", type="nbd", id="e", node_name="f", writable=True),
        Host(lambda folder: refused(folder / "a.raw")),
        step("block-export-del", id="e"),
        Host(lambda folder: refused(folder / "a.raw")),
        QUERY,
    ],
    "images made": [
        add(1, RW),
        add(2, RO),
        step("blockdev-create", job_id="j", options={"driver": "file", "filename": "/dev/fdset/1", "size": 2 << 20}),
        Job("j"),
        step("query-jobs"),
        Host(lambda folder: (folder / "a.raw").stat().st_size),
        step("job-dismiss", id="j"),
        step("blockdev-create", job_id="j", options={"driver": "file", "filename": "/dev/fdset/2", "size": 3 << 20}),
        Job("j"),
        step("query-jobs"),
        Host(lambda folder: (folder / "a.raw").stat().st_size),
        step("job-dismiss", id="j"),
        step("blockdev-add", driver="null-co", node_name="nul", size=1 << 20),
        step("blockdev-snapshot-sync", node_name="nul", snapshot_file="/dev/fdset/1", snapshot_node_name="s"),
        add(4, WO, name="log"),
        step("chardev-add", id="c", backend={"type": "file", "data": {"out": "/dev/fdset/4"}}),
        QUERY,
    ],
}


def even_out(text: str) -> str:
    return re.sub(r'"fd": \d+', '"fd": 0', text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_qemu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with short_folder() as folder:
        monkeypatch.chdir(folder)
        compare(
            folder,
            SCRIPTS[name],
            prepare=lambda own: create(own / "a.raw", "1M", format="raw") and None,
            even_out=even_out,
            events=name != "images made",
        )


# -- what QEMU does not promise ----------------------------------------------------------------------------------------
@pytest.fixture
def image(tmp_path: Path) -> Path:
    create(tmp_path / "a.raw", "1M", format="raw")
    return tmp_path / "a.raw"


def add_to(qmp: Qmp, number: int, image: Path, flags: int) -> None:
    fd = os.open(image, flags)
    qmp.call_with([fd], "add-fd", fdset_id=number)
    os.close(fd)


def test_two_nodes_on_one_descriptor_conflict_as_two_on_one_file(image: Path, short_path: Path) -> None:
    with Daemon(short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        add_to(qmp, 1, image, RW)
        for name in ("a", "b"):
            qmp.execute("blockdev-add", driver="file", node_name=name, filename="/dev/fdset/1")
        qmp.execute("device_add", driver="virtio-blk", drive="a", id="disk")
        with pytest.raises(QmpError, match='Failed to get "write" lock'):
            qmp.execute("device_add", driver="virtio-blk", drive="b", id="other")
        qmp.execute("device_del", id="disk")
        qmp.wait_event("DEVICE_DELETED")
        qmp.execute("device_add", driver="virtio-blk", drive="b", id="other")


def test_locks_are_given_up_with_the_node_though_the_set_lives_on(image: Path, short_path: Path) -> None:
    with Daemon(short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        add_to(qmp, 1, image, RW)
        qmp.execute("blockdev-add", driver="file", node_name="a", filename="/dev/fdset/1")
        qmp.execute("device_add", driver="virtio-blk", drive="a", id="disk")
        assert refused(image)
        qmp.execute("device_del", id="disk")
        qmp.wait_event("DEVICE_DELETED")
        qmp.execute("blockdev-del", node_name="a")
        assert qmp.execute("query-fdsets")[0]["fds"]
        qemu_img("resize", "-f", "raw", image, "2M")


def test_a_set_for_writing_alone_serves_a_node_that_may_be_read_only(image: Path, short_path: Path) -> None:
    with Daemon(short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        add_to(qmp, 1, image, RW)
        assert qmp.human("drive_add 0 if=none,id=d,file=/dev/fdset/1,format=raw") == "OK\r\n"
        qmp.human('qemu-io d "write -P 7 0 4k"')
    assert image.read_bytes()[:4096] == b"\7" * 4096


def test_what_nobody_takes_is_closed(image: Path, short_path: Path) -> None:
    with Daemon(short_path) as daemon:

        def count() -> int:
            return len(os.listdir(f"/proc/{daemon.child.pid}/fd"))

        with Qmp(daemon.qmp_socket) as qmp:
            before = count()
            fds = [os.open(image, RO) for _ in range(3)]
            for _ in range(5):
                qmp.call_with(fds, "query-version")
            assert count() <= before + len(fds)
            qmp.call_with(fds, "getfd", fdname="a")
            assert count() == before + 1
            qmp.execute("closefd", fdname="a")
            qmp.call_with(fds, "query-version")
        with Qmp(daemon.qmp_socket):
            assert count() == before
        for fd in fds:
            os.close(fd)


def test_an_answer_that_is_read_slowly_arrives_whole(short_path: Path) -> None:
    with Daemon(short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        for _ in range(40):
            qmp.send({"execute": "query-qmp-schema"})
        time.sleep(0.2)
        first = qmp.receive_line()
        assert len(first) > 64 << 10
        for _ in range(39):
            assert qmp.receive_line() == first


def test_an_export_by_a_listening_socket_that_was_passed(short_path: Path) -> None:
    with Daemon(short_path, nbd=False) as daemon, Qmp(daemon.qmp_socket) as qmp:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(short_path / "passed"))
            qmp.call_with([listener.fileno()], "getfd", fdname="l")
        qmp.execute("nbd-server-start", addr=LISTEN)
        qmp.execute("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
        qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="x")
        assert nbdinfo(f"nbd+unix:///x?socket={short_path / 'passed'}")["export-size"] == 1 << 20


def test_a_monitor_on_a_socket_pair(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    number = theirs.fileno()
    command = [executable(), "daemon", "-chardev", f"socket,id=mon,fd={number}", "-mon", "chardev=mon,mode=control"]
    with Process(command, log=short_path / "log", inherit=[number]) as process:
        theirs.close()
        with ours, ours.makefile("rb") as lines:
            ours.settimeout(30)
            assert b"QMP" in lines.readline()
            ours.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
            assert [b"return" in lines.readline() for _ in range(1)] == [True]
            rest = lines.read()
            assert b"SHUTDOWN" in rest
        process.wait()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fd=99,set=1", "fd is not valid or already in use"),
        ("fd=1,set=1", "fd cannot be a standard I/O stream"),
        ("set=1", "fd option is required and must be non-negative"),
        ("fd={fd}", "set option is required and must be non-negative"),
        ("fd={fd},set=-1", "set option is required and must be non-negative"),
        ("fd=x,set=1", "Parameter 'fd' expects a number"),
        ("fd={fd},set=1,foo=1", "Invalid parameter 'foo'"),
    ],
)
def test_add_fd_refused(option: str, message: str, image: Path) -> None:
    fd = os.open(image, RO)
    os.set_inheritable(fd, True)
    try:
        given = option.format(fd=fd)
        done = run([executable(), "daemon", "-add-fd", given], expect=1, inherit=[fd])
    finally:
        os.close(fd)
    assert done.stderr == f"livedisk daemon: -add-fd {given}: {message}\n"


def test_add_fd_on_the_command_line(image: Path, short_path: Path) -> None:
    fd = os.open(image, RW)
    os.set_inheritable(fd, True)
    options = ["-blockdev", "file,node-name=a,filename=/dev/fdset/3", "-add-fd", f"fd={fd},set=3,opaque=text"]
    with Daemon(short_path, *options, inherit=[fd]) as daemon, Qmp(daemon.qmp_socket) as qmp:
        os.close(fd)
        assert qmp.execute("query-fdsets") == [{"fdset-id": 3, "fds": [{"fd": fd, "opaque": "text"}]}]
        assert qmp.execute("query-named-block-nodes")[0]["file"] == "/dev/fdset/3"


def test_a_guest_moves_over_a_socket_that_both_were_given(short_path: Path) -> None:
    here, there = socket.socketpair()
    disk = ["-blockdev", "null-co,node-name=d,size=1048576", "-device", "virtio-blk,drive=d,id=v"]
    with (
        Daemon(short_path, *disk, name="src") as source,
        Daemon(short_path, *disk, "-incoming", "defer", name="dst") as destination,
        Qmp(source.qmp_socket) as from_,
        Qmp(destination.qmp_socket) as to,
    ):
        to.call_with([there.fileno()], "getfd", fdname="m")
        from_.call_with([here.fileno()], "getfd", fdname="m")
        here.close()
        there.close()
        to.execute("migrate-incoming", channels=[channel("m")])
        from_.execute("migrate", uri="fd:m")
        to.wait_event("RESUME")
        assert from_.execute("query-status")["status"] == "postmigrate"
