"""``livedisk daemon`` as a process: exit codes, messages, background, pid file, monitors, order of options."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.livedisk import executable, livedisk
from kit.peers import peer, run
from kit.process import Process
from kit.qemu import create
from kit.qmp import Qmp

DISK = "driver=null-co,node-name=disk"


@contextmanager
def running(
    folder: Path, *options: str, stdin: int = subprocess.DEVNULL, inherit: tuple[int, ...] = ()
) -> Iterator[Process]:
    arguments = [executable(), "daemon", *options]
    with Process(arguments, log=folder / "log", cwd=folder, stdin=stdin, inherit=inherit) as process:
        yield process


def qmp_of(process: Process, folder: Path, name: str = "q") -> Qmp:
    process.wait_for_socket(folder / name)
    return Qmp(folder / name)


# -- before anything is opened -----------------------------------------------------------------------------------------


def test_help_reads_like_a_manual_page_and_exits_with_0() -> None:
    page = livedisk("daemon", "--help").stdout
    assert page.startswith("NAME\n    livedisk daemon - ")
    assert "EXIT STATUS" in page
    assert livedisk("daemon", "-h").stdout == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-foo"], "livedisk daemon: -foo: invalid option"),
        (["-blockdev"], "livedisk daemon: -blockdev: requires an argument"),
        (["disk.img"], "livedisk daemon: disk.img: Unexpected argument"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], message: str) -> None:
    done = livedisk("daemon", *words, expect=2)
    assert done.stderr.splitlines()[0] == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-blockdev", "driver=foo"], "Parameter 'driver' does not accept value 'foo'"),
        (["-blockdev", "driver=raw,node-name=x"], "Parameter 'file' is missing"),
        (["-blockdev", "{bad"], "JSON parse error, invalid keyword 'bad'"),
        (["-blockdev", "driver=null-co"], "'node-name' must be specified for the root node"),
        (["--blockdev", '{"driver": "null-co", "node-name": "1x"}'], "Invalid node-name: '1x'"),
        (["-device", "foo"], "'foo' is not a valid device model name"),
        (["-device", "virtio-blk"], "drive property not set"),
        (["-device", "virtio-blk,drive=zz"], "Property 'virtio-blk-device.drive' can't find value 'zz'"),
        (["-object", "foo"], "Parameter 'qom-type' does not accept value 'foo'"),
        (["-object", "iothread"], "Parameter 'id' is missing"),
        (["-chardev", "foo,id=a"], "'foo' is not a valid char driver name"),
        (["-chardev", "null,path=/x,id=a"], "Invalid parameter 'path'"),
        (["-mon", "chardev=zz"], 'chardev "zz" not found'),
        (["--monitor", "zz"], 'chardev "zz" not found'),
        (["-monitor", "zz"], "'zz' is not a valid char driver"),
        (["-qmp", "zz"], "'zz' is not a valid char driver"),
        (["-qmp", "chardev:zz"], 'chardev "zz" not found'),
        (["-qmp", "unix:/nodir/x,server=on,wait=off"], "Failed to bind socket to /nodir/x: No such file or directory"),
        (["--export", "nbd,id=a,node-name=x"], "Cannot find device='' nor node-name='x'"),
        (["--export", "foo"], "Parameter 'type' does not accept value 'foo'"),
        (["--nbd-server", "foo"], "Expected '=' after parameter 'foo'"),
        (["-name", "foo,bar=1"], "Invalid parameter 'bar'"),
        (["-uuid", "zz"], "failed to parse UUID string: wrong format"),
        (["-incoming", "bogus:x"], "unknown migration protocol: bogus:x"),
        (["--trace", "x"], "there is no tracing; a Python profiler such as py-spy shows what the process does"),
        (["-daemonize", "-monitor", "stdio"], "cannot use stdio with -daemonize"),
    ],
)
def test_a_refused_option_is_quoted_and_exits_with_1(words: list[str], message: str) -> None:
    done = livedisk("daemon", *words, expect=1)
    quoted = " ".join(words[-2:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("livedisk daemon:")]
    assert lines == [f"livedisk daemon: {quoted}: {message}"]


MACHINE_ONLY = ["-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none"]


@pytest.mark.parametrize(
    "words",
    [
        ["-blockdev", "driver=foo"],
        ["-blockdev", "driver=raw,node-name=x"],
        ["-blockdev", '{"driver": "null-co", "node-name": "1x"}'],
        ["-device", "foo"],
        ["-device", "virtio-blk,drive=zz"],
        ["-mon", "foo=zz"],
        ["-chardev", "socket,id=a,path=/x,host=y"],
        ["-qmp", "chardev:zz"],
        ["-name", "foo,bar=1"],
        ["-uuid", "zz"],
        ["-pidfile", "/nodir/x"],
    ],
)
def test_refusals_are_those_of_qemu(words: list[str]) -> None:
    theirs = run(["qemu-system-x86_64", *MACHINE_ONLY, *words], expect=1).stderr.splitlines()[0]
    ours = livedisk("daemon", *words, expect=1).stderr.splitlines()[0]
    assert ours.removeprefix("livedisk daemon: ") == theirs.removeprefix("qemu-system-x86_64: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--blockdev", "driver=null-co"],
        ["--monitor", "chardev=c", "--chardev", "null,id=c"],
        ["--export", "nbd,id=a,node-name=n", "--blockdev", "null-co,node-name=n"],
        ["--blockdev", "null-co,node-name=a", "--export", "nbd,id=a,node-name=a"],
        ["--nbd-server", "addr.type=unix,addr.path=/nodir/x"],
        ["--object", "secret,id=a"],
        ["--monitor", "foo=zz"],
    ],
)
def test_refusals_and_order_are_those_of_the_storage_daemon(words: list[str]) -> None:
    theirs = run(["qemu-storage-daemon", *words], expect=1).stderr.splitlines()[0]
    ours = livedisk("daemon", *words, expect=1).stderr.splitlines()[0]
    assert ours.removeprefix("livedisk daemon: ") == theirs.removeprefix("qemu-storage-daemon: ")


def test_a_refused_option_leaves_no_socket_behind(short_path: Path) -> None:
    livedisk("daemon", "-qmp", f"unix:{short_path}/q,server=on,wait=off", "-qmp", "zz", expect=1)
    assert list(short_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-device", "help"], "  virtio-blk-pci"),
        (["-device", "virtio-blk,help"], "  serial=<str>"),
        (["-object", "help"], "  iothread"),
        (["-object", "secret,help"], "  format=<raw|base64>"),
        (["-chardev", "help"], "  socket"),
        (["-blockdev", "help"], "  qcow2"),
        (["-blockdev", "raw,help"], "  offset=<int>"),
    ],
)
def test_help_in_an_argument_lists_what_there_is(words: list[str], line: str) -> None:
    assert line in livedisk("daemon", *words).stdout.splitlines()


# -- running -----------------------------------------------------------------------------------------------------------


def test_the_command_line_of_qemus_page_on_live_operations(short_path: Path) -> None:
    create(short_path / "a.qcow2", "64M")
    words = (
        "-display none -no-user-config -nodefaults -m 512 "
        "-blockdev node-name=node-A,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./a.qcow2 "
        "-device virtio-blk,drive=node-A,id=virtio0 -monitor stdio -qmp unix:./qmp-sock,server=on,wait=off"
    )
    with running(short_path, *words.split(), stdin=subprocess.PIPE) as process:
        with qmp_of(process, short_path, "qmp-sock") as qmp:
            assert qmp.execute("query-status") == {"running": True, "status": "running"}
            [disk] = qmp.execute("query-block")
            assert disk["qdev"] == "/machine/peripheral/virtio0/virtio-backend"
            assert disk["inserted"]["node-name"] == "node-A"
        assert process.child.stdin is not None
        process.child.stdin.write(b"info status\nquit\n")
        process.child.stdin.flush()
        process.wait(expect=0)
        assert "VM status: running" in process.output()
        assert process.output().count("without effect here") == 1
        assert "-display none, -no-user-config, -nodefaults, -m 512" in process.output()
    assert not (short_path / "qmp-sock").exists()


def test_both_dashes_and_both_syntaxes_mean_the_same(short_path: Path) -> None:
    image = short_path / "i.raw"
    image.write_bytes(bytes(1 << 20))
    spellings = {
        "a": ("-blockdev", f"driver=raw,node-name=a,file.driver=file,file.filename={image},read-only=on"),
        "b": ("--blockdev", f"raw,node-name=b,file.driver=file,file.filename={image},read-only=true"),
        "c": (
            "-blockdev",
            json.dumps(
                {
                    "driver": "raw",
                    "node-name": "c",
                    "file": {"driver": "file", "filename": str(image)},
                    "read-only": True,
                }
            ),
        ),
    }
    options = [word for pair in spellings.values() for word in pair]
    with (
        running(short_path, "-qmp", "unix:./q,server=on,wait=off", *options) as process,
        qmp_of(process, short_path) as qmp,
    ):
        nodes = {node["node-name"]: node for node in qmp.execute("query-named-block-nodes", flat=True)}
        seen = [{**nodes[name], "node-name": ""} for name in spellings]
        assert seen[0] == seen[1] == seen[2]
        assert seen[0]["ro"] is True


def test_qemus_options_are_worked_off_in_qemus_order(short_path: Path) -> None:
    words = ["-qmp", "unix:./q,server=on,wait=off", "-device", "virtio-blk,drive=disk,iothread=io", "-blockdev", DISK]
    words += ["-mon", "chardev=c,mode=control", "-chardev", "socket,id=c,path=./c,server=on,wait=off"]
    with running(short_path, *words, "-object", "iothread,id=io") as process:
        for name in ("q", "c"):
            with qmp_of(process, short_path, name) as qmp:
                assert len(qmp.execute("query-block")) == 1


def test_several_monitors_serve_at_once_and_all_hear_events(short_path: Path) -> None:
    words = ["-qmp", "unix:./a,server=on,wait=off", "-qmp-pretty", "unix:./b,server=on,wait=off", "-blockdev", DISK]
    with (
        running(short_path, *words) as process,
        qmp_of(process, short_path, "a") as one,
        socket.socket(socket.AF_UNIX) as two,
    ):
        process.wait_for_socket(short_path / "b")
        two.connect(str(short_path / "b"))
        assert b'\r\n    "QMP": {' in two.recv(1 << 16)
        two.sendall(b'{"execute": "qmp_capabilities"}')
        assert two.recv(1 << 16).startswith(b"{\r\n")
        one.execute("stop")
        assert one.wait_event("STOP") == {}
        assert b'"event": "STOP"' in two.recv(1 << 16)


def test_dash_s_holds_the_guest_until_cont(short_path: Path) -> None:
    with (
        running(short_path, "-S", "-qmp", "unix:./q,server=on,wait=off") as process,
        qmp_of(process, short_path) as qmp,
    ):
        assert qmp.execute("query-status") == {"running": False, "status": "prelaunch"}
        qmp.execute("cont")
        assert qmp.execute("query-status") == {"running": True, "status": "running"}


def test_incoming_defer_waits_for_a_migration(short_path: Path) -> None:
    words = ["-incoming", "defer", "-qmp", "unix:./q,server=on,wait=off"]
    with running(short_path, *words) as process, qmp_of(process, short_path) as qmp:
        assert qmp.execute("query-status") == {"running": False, "status": "inmigrate"}


def test_name_and_uuid_are_told(short_path: Path) -> None:
    words = ["-name", "guest=disk one,debug-threads=on", "-uuid", "ABCDEF01-2345-6789-abcd-ef0123456789"]
    with (
        running(short_path, *words, "-qmp", "unix:./q,server=on,wait=off") as process,
        qmp_of(process, short_path) as qmp,
    ):
        assert qmp.execute("query-name") == {"name": "disk one"}
        assert qmp.execute("query-uuid") == {"UUID": "abcdef01-2345-6789-abcd-ef0123456789"}


def test_a_monitor_on_an_inherited_descriptor(short_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        words = ["-chardev", f"socket,id=c,fd={theirs.fileno()}", "-mon", "c,mode=control"]
        with running(short_path, *words, inherit=(theirs.fileno(),)):
            assert json.loads(ours.recv(1 << 16))["QMP"]["version"]["qemu"]["major"] >= 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly_and_announce_it(short_path: Path, number: signal.Signals) -> None:
    words = ["-qmp", "unix:./q,server=on,wait=off", "-blockdev", DISK, "-device", "virtio-blk,drive=disk"]
    with running(short_path, *words) as process, qmp_of(process, short_path) as qmp:
        process.signal(number)
        assert qmp.wait_event("SHUTDOWN") == {"guest": False, "reason": "host-signal"}
        process.wait(expect=0)


def test_a_signal_ends_the_wait_for_a_first_client(short_path: Path) -> None:
    with running(short_path, "-qmp", "unix:./q,server=on", "-blockdev", DISK) as process:
        process.wait_for_socket(short_path / "q")
        time.sleep(0.1)
        assert process.stop(expect=0) == 0
    assert not (short_path / "q").exists()


def test_quit_is_answered_after_its_event(short_path: Path) -> None:
    with running(short_path, "-qmp", "unix:./q,server=on,wait=off") as process, qmp_of(process, short_path) as qmp:
        assert qmp.execute("quit") == {}
        assert [event["event"] for event in qmp.events] == ["SHUTDOWN"]
        process.wait(expect=0)


# -- background --------------------------------------------------------------------------------------------------------


def test_daemonize_returns_when_everything_is_there(short_path: Path) -> None:
    pid_file = short_path / "pid"
    words = ["--daemonize", "--pidfile", str(pid_file), "--blockdev", DISK]
    words += ["--nbd-server", f"addr.type=unix,addr.path={short_path}/n", "--export", "nbd,id=e,node-name=disk"]
    livedisk("daemon", *words)
    pid = int(pid_file.read_text())
    try:
        assert run([peer("nbdinfo"), "--size", f"nbd+unix:///disk?socket={short_path}/n"]).stdout.strip() == str(
            1 << 30
        )
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
        again = livedisk("daemon", "--pidfile", str(pid_file), expect=1)
        assert "cannot create PID file: Could not lock" in again.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while pid_file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(short_path.iterdir()) == []


def test_a_start_that_fails_in_the_background_fails_in_the_foreground(short_path: Path) -> None:
    done = livedisk("daemon", "--daemonize", "--pidfile", f"{short_path}/pid", "--blockdev", "nonsense", expect=1)
    assert "does not accept value 'nonsense'" in done.stderr
    assert not (short_path / "pid").exists()


# -- size and speed ----------------------------------------------------------------------------------------------------


def test_start_is_quick_and_small(short_path: Path) -> None:
    """Prints what it measured. The bounds are loose: the machine may be busy."""
    took = []
    for _ in range(3):
        with running(short_path, "-qmp", "unix:./q,server=on,wait=off", "-blockdev", DISK) as process:
            with qmp_of(process, short_path) as qmp:
                took.append(time.monotonic() - process.started)
                assert qmp.greeting["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}
            resident = process.resident_bytes()
            process.stop(expect=0)
    print(f"first greeting {min(took) * 1000:.0f} ms, resident {resident >> 20} MiB")
    assert min(took) < 5
    assert resident < 80 << 20
