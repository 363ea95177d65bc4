"""The same QMP scripts to qemu-storage-daemon and to ours: replies, events and advertised exports must be alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import libnbd
from kit.livedisk import Daemon
from kit.places import short_folder
from kit.qemu import StorageDaemon, create
from kit.qmp import Qmp, QmpError

Step = tuple[str, dict[str, Any]]


def start(path: str = "SOCKET", **more: Any) -> Step:
    return "nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}, **more}


def inet(**data: Any) -> Step:
    return "nbd-server-start", {"addr": {"type": "inet", "data": data}}


def add(**arguments: Any) -> Step:
    return "block-export-add", {"type": "nbd", **{name.replace("_", "-"): value for name, value in arguments.items()}}


LONG = "/tmp/" + "a" * 120
SCRIPTS: dict[str, list[Step]] = {
    "without a server": [
        ("nbd-server-stop", {}),
        ("nbd-server-add", {"device": "x"}),
        ("nbd-server-add", {"device": "n"}),
        ("nbd-server-remove", {"name": "x"}),
        add(id="e", node_name="x"),
        add(id="e", node_name="n"),
        add(id="9", node_name="n"),
        ("block-export-del", {"id": "e"}),
        ("query-block-exports", {}),
    ],
    "exports": [
        start(),
        start(),
        add(id="e", node_name="n"),
        add(id="e", node_name="n"),
        add(id="e2", node_name="n"),
        add(id="e2", node_name="n", name="n2", writable=True),
        add(id="e3", node_name="ro", name="n3", writable=True),
        add(id="9e3", node_name="ro", name="n3"),
        add(id="e4", node_name="ro", name="n4", bitmaps=["x"]),
        add(id="e4", node_name="ro", name="n4", bitmaps=[{"node": "n", "name": "y"}]),
        add(id="e4", node_name="ro", name="n4", bitmaps=[{"node": "nope", "name": "y"}]),
        add(id="e5", node_name="ro", name="n4", description="d", allocation_depth=True, writethrough=True),
        add(id="e6", node_name="ro", name="n5", iothread="x"),
        add(id="e7", node_name="ro", name="", fixed_iothread=True),
        add(id="e8", node_name="n", writeable=True),
        add(id="e8", node_name="n", writable="on"),
        add(id="e8"),
        add(node_name="n"),
        ("block-export-add", {"type": "foo", "id": "e6", "node-name": "ro"}),
        ("block-export-add", {"id": "e6", "node-name": "ro"}),
        ("query-block-exports", {}),
        ("nbd-server-add", {"device": "n"}),
        ("nbd-server-add", {"device": "n", "name": "zz", "writable": True}),
        ("nbd-server-add", {"device": "ro", "name": "zzr", "writable": True}),
        ("nbd-server-add", {"device": "ro", "name": "e5"}),
        ("nbd-server-add", {"device": "ro", "name": "a b"}),
        ("nbd-server-add", {"device": "ro", "name": "b1", "bitmap": "bm"}),
        ("nbd-server-add", {"device": "ro", "name": "b1", "bitmaps": ["bm"]}),
        ("query-block-exports", {}),
        ("nbd-server-remove", {"name": "zz"}),
        ("nbd-server-remove", {"name": "zz", "mode": "foo"}),
        ("nbd-server-remove", {"name": "nope"}),
        ("block-export-del", {"id": "e5", "mode": "hard"}),
        ("blockdev-del", {"node-name": "n"}),
        ("query-block-exports", {}),
        ("nbd-server-stop", {}),
        ("query-block-exports", {}),
        ("blockdev-del", {"node-name": "n"}),
    ],
    "addresses": [
        inet(host="nosuchhost.invalid", port="9999"),
        inet(host="1.2.3.4", port="9999"),
        inet(host="localhost", port="foo"),
        inet(host="localhost"),
        inet(host="localhost", port="1", ipv4=False, ipv6=False),
        start("/nonexistent/x"),
        start(LONG),
        ("nbd-server-start", {"addr": {"type": "foo", "data": {"path": "x"}}}),
        ("nbd-server-start", {"addr": {"type": "unix", "path": "x"}}),
        start(**{"tls-creds": "nope"}),
        start(**{"max-connections": -1}),
        start(**{"handshake-max-seconds": 5_000_000_000}),
        inet(host="localhost", port="0"),
        ("nbd-server-stop", {}),
    ],
}
NODES = (
    *("--blockdev", "null-co,node-name=n,size=1048576"),
    *("--blockdev", "null-co,node-name=ro,size=1048576,read-only=on"),
)


def transcript(daemon: StorageDaemon, steps: list[Step], socket: Path) -> list[Any]:
    """What a client sees, step by step: results, errors, and the events up to each reply."""
    seen: list[Any] = []
    with daemon.qmp() as qmp:
        for command, arguments in steps:
            seen.append((command, reply(qmp, command, with_socket(arguments, socket))))
            seen.extend((event["event"], event.get("data")) for event in qmp.events)
            qmp.events.clear()
    return seen


def with_socket(arguments: dict[str, Any], socket: Path) -> dict[str, Any]:
    path = arguments.get("addr", {}).get("data", {}).get("path")
    return {**arguments, "addr": {"type": "unix", "data": {"path": str(socket)}}} if path == "SOCKET" else arguments


def reply(qmp: Qmp, command: str, arguments: dict[str, Any]) -> Any:
    try:
        return qmp.call(command, arguments)
    except QmpError as error:
        return error.kind, error.desc


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_answer_as_qemu_storage_daemon_answers(name: str) -> None:
    seen = []
    for make in (StorageDaemon, Daemon):
        with short_folder() as folder, make(folder, *NODES, nbd=False) as daemon:
            seen.append(transcript(daemon, SCRIPTS[name], folder / "nbd"))
    theirs, ours = seen
    assert ours == theirs


@pytest.mark.parametrize("writable", [True, False])
def test_the_file_of_an_image_in_use_is_refused_in_the_same_words(writable: bool, tmp_path: Path) -> None:
    image = create(tmp_path / "q.qcow2", "1M")
    nodes = ("--blockdev", f"qcow2,node-name=q,file.driver=file,file.node-name=f,file.filename={image}")
    steps = [start(), add(id="e", node_name="q", writable=True), add(id="e2", node_name="f", writable=writable)]
    seen = []
    for make in (StorageDaemon, Daemon):
        with short_folder() as folder, make(folder, *nodes, nbd=False) as daemon:
            seen.append(transcript(daemon, steps, folder / "nbd"))
    theirs, ours = seen
    assert theirs[-1][1][1].startswith("Permission conflict on node 'f'")
    assert ours == theirs


def test_nbdinfo_sees_the_same_exports(short_path: Path) -> None:
    image = short_path / "a.raw"
    image.write_bytes(b"")
    os.truncate(image, 1 << 20)
    exports = (
        *("--blockdev", f"file,filename={image},node-name=f"),
        *("--export", "nbd,id=w,node-name=f,writable=on,description=text"),
        *("--export", "nbd,id=r,node-name=f,name=ro,allocation-depth=on"),
    )

    def look(make: Callable[..., StorageDaemon]) -> list[dict[str, Any]]:
        with short_folder() as folder, make(folder, *exports) as daemon:
            infos = [libnbd.nbdinfo(daemon.uri(name)) for name in ("f", "ro")]
        for info in infos:
            info.pop("uri", None)
        return infos

    assert look(Daemon) == look(StorageDaemon)


def test_safe_removal_is_refused_and_hard_removal_disconnects() -> None:
    def look(make: Callable[..., StorageDaemon]) -> list[Any]:
        with short_folder() as folder, make(folder, *NODES, "--export", "nbd,id=e,node-name=n") as daemon:
            code = """
                import json, socket
                def qmp(**command):
                    stream.write(json.dumps(command).encode()); stream.flush()
                    while True:
                        got = json.loads(stream.readline())
                        if "event" not in got:
                            return got.get("error") or got["return"]
                link = socket.socket(socket.AF_UNIX); link.connect(path); stream = link.makefile("rwb"); stream.readline()
                h.connect_uri(where)
                result = [qmp(execute="qmp_capabilities")]
                result.append(qmp(execute="block-export-del", arguments={"id": "e"}))
                result.append(qmp(execute="nbd-server-remove", arguments={"name": "e"}))
                result.append(qmp(execute="query-block-exports"))
                result.append(qmp(execute="block-export-del", arguments={"id": "e", "mode": "hard"}))
                try:
                    h.pread(512, 0); result.append("served")
                except nbd.Error:
                    result.append("gone")
                """
            seen: list[Any] = libnbd.script(None, code, path=str(daemon.qmp_socket), where=daemon.uri("n"))
            return seen

    theirs = look(StorageDaemon)
    assert theirs[-1] == "gone"
    assert look(Daemon) == theirs
