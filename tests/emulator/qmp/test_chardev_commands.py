"""Character devices that come and go, what clients of a machine ask, and the human monitor on objects: as QEMU answers."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon, executable
from kit.peers import peer
from kit.qemu import create
from kit.qmp import Qmp, QmpError
from kit.side_by_side import MACHINE, Host, Human, Step, compare, session, step
from livedisk.emulator.qmp.telnet import Telnet


def add(name: str, kind: str, **data: Any) -> Step:
    return step("chardev-add", id=name, backend={"type": kind, "data": data})


def unix(path: str, **more: Any) -> dict[str, Any]:
    return {"addr": {"type": "unix", "data": {"path": path}}, **more}


INET = {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}, "server": True, "wait": False}
NODES = [
    *("-blockdev", "qcow2,node-name=a,file.driver=file,file.node-name=af,file.filename=a.qcow2"),
    *("-blockdev", "null-co,node-name=b", "-object", "iothread,id=io0", "-device", "virtio-blk-pci,drive=a,id=v1"),
]
SCRIPTS: dict[str, list[Step]] = {
    "character devices": [
        add("c0", "null"),
        add("c0", "null"),
        add("c1", "zz"),
        step("chardev-add", id="c1", backend={"type": "null"}),
        add("c1", "file", out="c1.out"),
        add("c2", "file", out="none/c1.out"),
        add("c3", "socket", **unix("c3.sock", server=True, wait=False)),
        add("c4", "socket", **unix("none.sock", server=False)),
        add("c4", "socket", **INET),
        add("c6", "ringbuf", size=65),
        add("c6", "ringbuf", size=64),
        add("c7", "pipe", device="none"),
        add("c8", "socket", **unix("c8.sock", server=True, reconnect=1)),
        step("query-chardev"),
        *(step("ringbuf-write", device=name, data="hello") for name in ("c6", "zz", "c0")),
        step("ringbuf-write", device="c6", data="aGVsbG8=", format="base64"),
        step("ringbuf-write", device="c6", data="h!", format="base64"),
        step("ringbuf-read", device="c6", size=4),
        step("ringbuf-read", device="c6", size=400, format="base64"),
        *(step("ringbuf-read", device=name, size=size) for name, size in (("c6", 0), ("c0", 4), ("zz", 4), ("c6", 9))),
        step("ringbuf-write", device="c6", data="x" * 100 + "end"),
        step("ringbuf-read", device="c6", size=100),
        step("chardev-change", id="c0", backend={"type": "ringbuf", "data": {}}),
        step("chardev-change", id="zz", backend={"type": "ringbuf", "data": {}}),
        *(step("chardev-send-break", id=name) for name in ("c0", "zz")),
        *(step("chardev-remove", id=name) for name in ("c0", "zz", "compat_monitor0")),
        step("query-chardev"),
        *(
            Human(f"chardev-{line}")
            for line in ("add null,id=h0", "add null,id=h0", "add zz,id=h1", "remove h0", "remove h0")
        ),
        *(Human(f"chardev-{line}") for line in ("add ringbuf,id=h2,size=64", "send-break zz")),
        *(
            Human(f"ringbuf_{line}")
            for line in ("write h2 hello", "read h2 3", "read h2 9", "read zz 9", "write h2 a b")
        ),
        *(Human(f"help {name}") for name in ("chardev-add", "chardev-remove", "ringbuf_read", "ringbuf_write")),
    ],
    "terminals, logs and changes": [
        add("p", "pty"),
        add("q", "pty", path="link"),
        add("r", "pty", path="link"),
        Host(lambda folder: (folder / "link").is_symlink()),
        step("chardev-remove", id="q"),
        Host(lambda folder: (folder / "link").is_symlink()),
        step("chardev-change", id="p", backend={"type": "pty", "data": {}}),
        *(
            add(f"l-{kind}", kind, logfile=f"{kind}.log", logappend=True, **data)
            for kind, data in (("null", {}), ("file", {"out": "o"}), ("ringbuf", {}), ("pipe", {"device": "none"}))
        ),
        add("l-socket", "socket", **unix("l.sock", wait=False, logfile="socket.log")),
        add("bad", "null", logfile="none/log"),
        add("good", "null", logappend=True),
        Host(lambda folder: sorted(path.name for path in folder.glob("*.log"))),
        step("chardev-change", id="l-null", backend={"type": "null", "data": {"logfile": "other.log"}}),
        Host(lambda folder: (folder / "other.log").read_text()),
        step("chardev-change", id="compat_monitor0", backend={"type": "null", "data": {}}),
        *(Human(f"chardev-change {what}") for what in ("p null,id=p", "zz null", "compat_monitor0 null", "p null")),
        Human("help chardev-change"),
        step("query-chardev"),
    ],
    "where nodes run": [
        step("x-blockdev-change", parent="zz"),
        step("x-blockdev-change", parent="a"),
        step("x-blockdev-change", parent="a", node="b"),
        step("x-blockdev-change", parent="a", node="b", child="c"),
        step("x-blockdev-change", parent="a", child="c"),
        step("x-blockdev-change", parent="a", child="file"),
        step("x-blockdev-change", parent="a", node="zz"),
        step("x-blockdev-set-iothread", node_name="zz", iothread="io0"),
        step("x-blockdev-set-iothread", node_name="b", iothread="zz"),
        step("x-blockdev-set-iothread", node_name="b", iothread="io0"),
        step("x-blockdev-set-iothread", node_name="b", iothread=None),
        step("x-blockdev-set-iothread", node_name="b"),
        step("x-blockdev-set-iothread", node_name="a", iothread="io0"),
        step("query-command-line-options", option="zz"),
        step("query-target"),
    ],
    "the human monitor": [
        *(Human(f"qom-list{path}") for path in ("", " /objects/io0", " /zz")),
        *(
            Human(f"qom-get {what}")
            for what in ("/objects/io0 poll-max-ns", "/objects/io0 type", "v1 drive", "v1 zz", "v1")
        ),
        *(
            Human(f"qom-set {what}")
            for what in ("/objects/io0 poll-max-ns 5", "/objects/io0 zz 5", "/objects zz 3", "v1 x")
        ),
        Human("qom-set -j io0 poll-max-ns 7"),
        Human("qom-get io0 poll-max-ns"),
        *(Human(f"object_add {what}") for what in ("iothread,id=io1", "iothread,id=io1", "zz,id=io2", "iothread")),
        *(Human(f"object_del {what}") for what in ("zz", "io1")),
        Human("info iothreads"),
        *(Human(f"device_{what}") for what in ("add zz", "del zz")),
        *(Human(line) for line in ("stop", "info status", "cont", "info status", "info uuid", "info snapshots")),
        step("blockdev-snapshot-internal-sync", device="a", name="one"),
        Human("info snapshots"),
        *(
            Human(f"help {name}")
            for name in ("qom-list", "qom-get", "qom-set", "object_add", "object_del", "stop", "c")
        ),
        *(Human(f"help {name}") for name in ("device_add", "device_del")),
    ],
}


def even(text: str) -> str:
    text = re.sub(r"qmp-[0-9a-f]{8}", "qmp", text)
    text = re.sub(r"127\.0\.0\.1:\d+", "HOST", text)
    text = re.sub(r"/dev/pts/\d+", "/dev/pts/N", text)
    text = re.sub(r"thread_id=\d+", "", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  [\d:.]+", "DATE", text)
    text = re.sub(r"\\r\\n(Known|Accepted)[^\\]*", "", text)  # what would be accepted: more than QEMU says
    value = json.loads(text)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "label" in value[0]:
        value.sort(key=lambda one: one["label"])
    if isinstance(value, str) and "(int)" in value:
        value = "".join(sorted(value.splitlines(keepends=True)))
    return json.dumps(value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_are_those_of_qemu(name: str, tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        create(folder / "a.qcow2", "4M")

    options = [*MACHINE, *NODES]
    script = [*SCRIPTS[name], Host(lambda folder: (folder / "c1.out").exists())]
    compare(tmp_path, script, prepare=prepare, options=options, even_out=even, events=False)


def test_monitors_on_a_file_on_pipes_and_on_a_socket_added_later(short_path: Path) -> None:
    for name in ("p.in", "p.out"):
        os.mkfifo(short_path / name)
    options = ["-chardev", f"file,id=f,path={short_path / 'f'},append=on", "-mon", "chardev=f,mode=control"]
    options += ["-chardev", f"pipe,id=p,path={short_path / 'p'}", "-mon", "chardev=p,mode=readline"]
    (short_path / "f").write_text("before\n")
    with Daemon(short_path, *options, nbd=False) as daemon, daemon.qmp() as qmp:
        assert (short_path / "f").read_text().startswith('before\n{"QMP": ')
        with (short_path / "p.in").open("w") as keys, (short_path / "p.out").open("rb") as shown:
            keys.write("info name\n")
            keys.flush()
            said = b""
            while said.count(b"(qemu) ") < 2:
                said += os.read(shown.fileno(), 4096)
        path = str(short_path / "late")
        qmp.execute("chardev-add", id="late", backend={"type": "socket", "data": unix(path, server=True, wait=False)})
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        qmp.execute("chardev-remove", id="late")
        assert not Path(path).exists()
        assert {one["label"]: one["frontend-open"] for one in qmp.execute("query-chardev")}["p"]


def test_a_monitor_on_a_terminal_greets_whoever_opens_it_and_logs_what_it_says(short_path: Path) -> None:
    link, log = short_path / "terminal", short_path / "log"
    log.write_text("before\n")
    options = ["-chardev", f"pty,id=t,path={link},logfile={log},logappend=on", "-mon", "chardev=t,mode=control"]
    with Daemon(short_path, *options, nbd=False) as daemon, daemon.qmp() as qmp:
        assert f"char device redirected to {os.readlink(link)} (label t)" in daemon.output()
        for _ in range(2):
            terminal = os.open(link, os.O_RDWR | os.O_NOCTTY)
            with os.fdopen(terminal, "r+b", buffering=0) as line:
                assert b'{"QMP": ' in _until_line(line)
                line.write(b'{"execute": "qmp_capabilities"}')
                assert _until_line(line) == b'{"return": {}}\r\n'
                line.write(b'{"execute": "query-qmp-schema"}')
                assert len(_until_line(line)) > 64 << 10
            for _ in range(2):  # turns of the daemon's loop, which sees the hang-up in the first
                qmp.execute("query-version")
        written = log.read_text()
    assert written.startswith('before\n{"QMP": ')
    assert written.count('{"return": {}}\n') == 2
    assert not os.path.lexists(link)


def _until_line(line: Any) -> bytes:
    said = b""
    while not said.endswith(b"\n"):
        said += line.read(4096)
    return said


@pytest.mark.parametrize("kind", [Daemon, None], ids=["ours", "theirs"])
def test_a_monitor_by_telnet(kind: type[Daemon] | None, short_path: Path) -> None:
    command = [executable(), "daemon"] if kind else [peer("qemu-system-x86_64")]
    with session(command, short_path, [*MACHINE, "-monitor", "telnet:127.0.0.1:0,server=on,wait=off"]) as qmp:
        found = next(one["filename"] for one in qmp.execute("query-chardev") if "telnet" in one["filename"])
        address = found.removeprefix("disconnected:telnet:").removesuffix(",server=on")
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=30) as client:
            assert _until(client, b"(qemu) ").startswith(bytes((255, 251, 1, 255, 251, 3, 255, 251, 0, 255, 253, 0)))
            for piece in (b"\xff", b"\xfd\x01info \xff\xfb", b"\x03name\r\n"):
                client.sendall(piece)
            said = _until(client, b"\n(qemu) ")
            assert b"unknown command" not in said
            assert b"\xff" not in said


def _until(client: socket.socket, end: bytes) -> bytes:
    said = b""
    while not said.endswith(end):
        piece = client.recv(4096)
        assert piece, said
        said += piece
    return said


def test_a_telnet_stream_cut_anywhere() -> None:
    stream = b"a\xff\xfd\x01b\xff\xffc\xff\xfb\xff!d"
    for cut in range(len(stream) + 1):
        telnet = Telnet()
        assert telnet.take(stream[:cut]) + telnet.take(stream[cut:]) == b"ab\xffc!d"


def test_one_pipe_of_two_is_no_pair(short_path: Path) -> None:
    os.mkfifo(short_path / "h.in")
    with Daemon(short_path, nbd=False) as daemon, daemon.qmp() as qmp:
        backend = {"type": "pipe", "data": {"device": str(short_path / "h")}}
        with pytest.raises(QmpError, match=r"h': No such file"):
            qmp.execute("chardev-add", id="h", backend=backend)
        (short_path / "h").touch()
        qmp.execute("chardev-add", id="h", backend=backend)
        fds = Path(f"/proc/{daemon.pid}/fd")
        assert [fd.resolve().name for fd in fds.iterdir() if fd.resolve().parent == short_path].count("h.in") == 0


@pytest.mark.parametrize(("name", "value"), [("numeric", True), ("to", 9), ("keep-alive", True), ("mptcp", True)])
def test_what_an_address_cannot_have_is_refused_by_name(name: str, value: object, short_path: Path) -> None:
    with Daemon(short_path, nbd=False) as daemon, daemon.qmp() as qmp:
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", name: value}}
        with pytest.raises(QmpError, match=f"'{name}' is not supported"):
            qmp.execute("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "wait": False}})


def test_what_tools_ask_on_connecting_is_answered(short_path: Path) -> None:
    with Daemon(short_path, nbd=False) as daemon, daemon.qmp() as qmp:
        assert qmp.execute("query-kvm") == {"enabled": False, "present": False}
        assert qmp.execute("query-cpus-fast") == []
        assert {"option": "device", "parameters": []} in qmp.execute("query-command-line-options")
        assert _lines(qmp, "info qom-tree")[0] == "/machine (none-machine)"
        assert _lines(qmp, "info qtree -b")[0] == "bus: main-system-bus"
        assert _lines(qmp, "info kvm") == ["kvm support: not compiled"]


def _lines(qmp: Qmp, line: str) -> list[str]:
    return qmp.human(line).splitlines()
