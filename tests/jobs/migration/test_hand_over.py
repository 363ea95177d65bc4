"""migrate and migrate-incoming: as QEMU's, and against other ends that refuse, vanish or talk nonsense at every step."""

from __future__ import annotations

import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kit import certificates
from kit.livedisk import Daemon, livedisk
from kit.peers import peer
from kit.places import short_folder
from kit.process import Process
from kit.qemu import create, qemu_io
from kit.qmp import Qmp, QmpError
from livedisk.jobs.migration import wire
from livedisk.jobs.migration.wire import (
    MAGIC,
    Activated,
    Bitmap,
    BitmapBits,
    DeviceState,
    Disk,
    Go,
    Hello,
    Refusal,
    Running,
    Switch,
    Welcome,
)

SIZE = 4 << 20


def ended(qmp: Qmp) -> dict[str, Any]:
    """query-migrate when the migration is over."""
    deadline = time.monotonic() + 20
    while True:
        state: dict[str, Any] = qmp.execute("query-migrate")
        if state.get("status") in ("completed", "failed", "cancelled"):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.02)


def status(qmp: Qmp) -> str:
    return str(qmp.execute("query-status")["status"])


def given_up(qmp: Qmp) -> None:
    """Wait until the image of node d is unlocked and closed to commands."""
    deadline = time.monotonic() + 20
    while "is busy: the guest was migrated" not in str(asked(qmp, "block_resize", **{"node-name": "d", "size": SIZE})):
        assert time.monotonic() < deadline


# -- as QEMU -------------------------------------------------------------------------------------------------------------


class Machine(Process):
    """QEMU without a machine, or livedisk, with a QMP socket."""

    def __init__(self, folder: Path, kind: str, name: str, *options: str) -> None:
        self.socket = folder / f"{name}.qmp"
        if kind == "qemu":
            first = [peer("qemu-system-x86_64"), "-M", "none", "-nodefaults", "-display", "none"]
        else:
            first = [*Daemon.executable()]
        super().__init__(
            [*first, "-qmp", f"unix:{self.socket},server=on,wait=off", *options], log=folder / f"{name}.log"
        )
        self.wait_for_socket(self.socket)


def asked(qmp: Qmp, command: str, **arguments: Any) -> Any:
    try:
        return qmp.call(command, arguments)
    except QmpError as error:
        return error.desc


def told(qmp: Qmp, name: str = "MIGRATION") -> list[str]:
    """The statuses of the events that came, and others in their place."""
    qmp.execute("query-status")
    return [
        event["data"]["status"] if event["event"] == name else event["event"]
        for event in qmp.events
        if event["event"] in (name, "STOP", "RESUME")
    ]


def conversation(folder: Path, kind: str) -> dict[str, Any]:
    """What one kind of daemon says to a migration from first to last."""
    said: dict[str, Any] = {}
    where = f"unix:{folder}/guest"
    with (
        Machine(folder, kind, "s") as a,
        Machine(folder, kind, "t", "-incoming", "defer", "-S") as b,
        Qmp(a.socket) as source,
        Qmp(b.socket) as target,
    ):
        said["before"] = [asked(qmp, "query-migrate") for qmp in (source, target)], status(target)
        said["capabilities"] = [one["capability"] for one in asked(source, "query-migrate-capabilities")]
        said["cont"] = asked(target, "cont"), status(target)
        said["refusals"] = [
            asked(source, "migrate-incoming", uri=where),
            asked(target, "migrate-incoming", uri="bogus:x"),
            asked(target, "migrate-incoming"),
            asked(target, "migrate-incoming", uri=where),
            asked(target, "migrate-incoming", uri=where),
            asked(target, "migrate", uri=where),
            asked(source, "migrate-continue", state="pre-switchover"),
            asked(source, "migrate_cancel"),
            asked(source, "migrate", uri="bogus"),
            asked(source, "migrate", uri=f"unix:{folder}/nobody"),
        ]
        said["nobody"] = ended(source)
        listening = asked(target, "query-migrate")
        said["listening"] = listening["status"], listening["socket-address"]
        switched = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
        said["switching"] = asked(source, "migrate-set-capabilities", capabilities=switched)
        asked(target, "migrate-set-capabilities", capabilities=switched[:1])
        asked(source, "migrate", uri=where)
        source.wait_event("MIGRATION", lambda data: data["status"] == "pre-switchover")
        said["held"] = status(source), asked(source, "cont"), asked(source, "migrate", uri=where)
        said["wrong"] = asked(source, "migrate-continue", state="device")
        said["on"] = asked(source, "migrate-continue", state="pre-switchover")
        said["end"] = ended(source)["status"], ended(target)["status"], status(source), status(target)
        said["keys"] = {"downtime", "total-time", "setup-time"} <= set(ended(source))
        said["back"] = asked(source, "cont"), status(source)
        said["later"] = told(target)
        # Cancelled while it is held, it runs on.
        with Machine(folder, kind, "u", "-incoming", f"unix:{folder}/again") as other:
            other.wait_for_socket(folder / "again")
            asked(source, "migrate", uri=f"unix:{folder}/again")
            source.wait_event("MIGRATION", lambda data: data["status"] == "pre-switchover")
            asked(source, "migrate_cancel")
            said["cancelled"] = ended(source)["status"], status(source)
            other.wait(expect=None)
    return {name: plain(value, folder) for name, value in said.items()}


def plain(value: Any, folder: Path) -> Any:
    text = msgspec.json.encode(value).decode().replace(str(folder), "FOLDER")
    return msgspec.json.decode(text)


def test_a_migration_is_told_as_qemu_tells_it(short_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folders = {kind: short_path / kind for kind in ("qemu", "ours")}
    for folder in folders.values():
        folder.mkdir()
    assert conversation(folders["ours"], "ours") == conversation(folders["qemu"], "qemu")


def test_qemus_stream_is_refused_by_name(short_path: Path) -> None:
    where = f"unix:{short_path}/guest"
    with (
        Machine(short_path, "qemu", "s") as a,
        Machine(short_path, "ours", "t", "-incoming", where) as b,
        Qmp(a.socket) as source,
    ):
        b.wait_for_socket(short_path / "guest")
        source.execute("migrate", uri=where)
        b.wait(expect=None)
        assert "this is QEMU's migration stream" in b.output()


def test_to_qemu_it_fails_and_the_guest_goes_on(short_path: Path) -> None:
    where = f"unix:{short_path}/guest"
    with (
        Machine(short_path, "ours", "s") as a,
        Machine(short_path, "qemu", "t", "-incoming", where) as b,
        Qmp(a.socket) as source,
    ):
        b.wait_for_socket(short_path / "guest")
        source.execute("migrate", uri=where)
        state = ended(source)
        assert (state["status"], status(source)) == ("failed", "running")
        assert "destination" in state["error-desc"]


# -- a source, and destinations made by hand -----------------------------------------------------------------------------


@pytest.fixture
def source(short_path: Path) -> Iterator[tuple[Daemon, Qmp]]:
    """A guest with one disk, exported as "disk"."""
    image = create(short_path / "d.qcow2", SIZE)
    node = f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}"
    with (
        Daemon(short_path, "--blockdev", node, "--device", "virtio-blk,drive=d,id=virtio0") as daemon,
        daemon.qmp() as qmp,
    ):
        qmp.call("nbd-server-add", {"device": "virtio0", "name": "disk", "writable": True})
        yield daemon, qmp


class Peer:
    """One end of the stream by hand, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def receive(self) -> Any:
        return msgspec.msgpack.decode(self.take(struct.unpack(">I", self.take(4))[0]), type=wire.Message)

    def send(self, *messages: Any) -> None:
        for message in messages:
            data = msgspec.msgpack.encode(message)
            self.sock.sendall(struct.pack(">I", len(data)) + data)

    def until(self, kind: type) -> Any:
        while not isinstance(message := self.receive(), kind):
            pass
        return message


@contextmanager
def destination(path: Path, act: Callable[[Peer], None]) -> Iterator[str]:
    """Somebody who takes one migration and does ``act`` with it; the URI."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    problems: list[BaseException] = []

    def run() -> None:
        try:
            client, _ = listener.accept()
            with closing(client):
                end = Peer(client)
                assert end.take(len(MAGIC)) == MAGIC
                act(end)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"unix:{path}"
    finally:
        thread.join()
        listener.close()
        assert problems == []


def refuse_at_once(end: Peer) -> None:
    hello = end.receive()
    assert [disk.path for disk in hello.disks] == ["/machine/peripheral/virtio0"]
    assert hello.disks[0].size == SIZE
    end.send(Refusal("no room"))


def vanish_at_once(end: Peer) -> None:
    end.receive()


def vanish_when_asked_to_take_over(end: Peer) -> None:
    end.receive()
    end.send(Welcome())
    end.until(Switch)


def refuse_to_take_over(end: Peer) -> None:
    end.receive()
    end.send(Welcome())
    end.until(Switch)
    end.send(Refusal("the images are locked"))


def talk_nonsense(end: Peer) -> None:
    end.receive()
    end.sock.sendall(struct.pack(">I", 5) + b"hello")


def announce_too_much(end: Peer) -> None:
    end.receive()
    end.sock.sendall(struct.pack(">I", 1 << 31))


def say_what_is_not_due(end: Peer) -> None:
    end.receive()
    end.send(Running())


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (refuse_at_once, "the destination refused: no room"),
        (vanish_at_once, "the destination closed the connection"),
        (vanish_when_asked_to_take_over, "the destination closed the connection"),
        (refuse_to_take_over, "the destination refused: the images are locked"),
        (talk_nonsense, "the destination sent what is no message"),
        (announce_too_much, "the destination sent a message of 2147483648 bytes"),
        (say_what_is_not_due, "the destination sent Running where Welcome was due"),
    ],
)
def test_before_the_point_of_no_return_the_guest_goes_on(
    source: tuple[Daemon, Qmp], short_path: Path, act: Callable[[Peer], None], reason: str
) -> None:
    daemon, qmp = source
    with destination(short_path / "guest", act) as uri:
        qmp.call("migrate", {"uri": uri, "x-hand-over": {"exports": ["disk"]}})
        state = ended(qmp)
    assert state["status"] == "failed"
    assert reason in state["error-desc"]
    assert status(qmp) == "running"
    qemu_io(daemon.uri("disk"), "write -P 1 0 64k", "read -P 1 0 64k", format="raw")


def test_after_it_the_guest_is_given_up_even_if_the_word_is_lost(source: tuple[Daemon, Qmp], short_path: Path) -> None:
    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        end.until(Switch)
        end.send(Activated())
        assert end.receive() == Go(running=True)

    daemon, qmp = source
    with destination(short_path / "guest", act) as uri:
        qmp.call("migrate", {"uri": uri, "x-hand-over": {"exports": ["disk"]}})
        state = ended(qmp)
    assert state["status"] == "completed"
    assert "did not confirm" in state["error-desc"]
    assert status(qmp) == "postmigrate"
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    assert qmp.execute("query-block-exports") == []
    assert asked(qmp, "migrate", uri=f"unix:{short_path}/x") == "The guest was migrated already: another process has it"
    # The image is complete and unlocked, soon: another process may have it.
    given_up(qmp)
    qemu_io(short_path / "d.qcow2", "write -P 3 0 64k")
    # Taking the guest back reads the image anew.
    qmp.execute("cont")
    assert status(qmp) == "running"
    qmp.call("nbd-server-add", {"device": "virtio0", "name": "disk", "writable": True})
    qemu_io(daemon.uri("disk"), "read -P 3 0 64k", "write -P 4 0 64k", format="raw")


def test_while_the_last_word_is_on_its_way_the_guest_is_not_taken_back(
    source: tuple[Daemon, Qmp], short_path: Path
) -> None:
    gone, go_on = threading.Event(), threading.Event()

    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        end.until(Switch)
        end.send(Activated())
        end.until(Go)
        gone.set()
        assert go_on.wait(20)
        end.send(Running())

    _, qmp = source
    with destination(short_path / "guest", act) as uri:
        qmp.execute("migrate", uri=uri)
        assert gone.wait(20)
        assert asked(qmp, "cont") == "Migration is not finalized yet"
        assert status(qmp) == "postmigrate"
        go_on.set()
        assert "error-desc" not in ended(qmp)
    # What is told to be over is over: the images were given up before they are taken back.
    qmp.execute("cont")
    assert status(qmp) == "running"
    assert "busy" not in str(asked(qmp, "block_resize", **{"node-name": "d", "size": 2 * SIZE}))


def mirror(qmp: Qmp, folder: Path, **more: Any) -> Path:
    """A mirror m of the source's disk that is ready; its target."""
    image = create(folder / "m.qcow2", SIZE)
    file = {"driver": "file", "filename": str(image)}
    qmp.call("blockdev-add", {"node-name": "m", "driver": "qcow2", "file": file})
    qmp.call("blockdev-mirror", {"job-id": "m", "device": "d", "target": "m", "sync": "full", **more})
    qmp.wait_event("BLOCK_JOB_READY")
    return image


def test_a_mirror_that_ended_before_the_guest_was_held_ends_the_migration(
    source: tuple[Daemon, Qmp], short_path: Path
) -> None:
    """What the guest wrote after the mirror's end would be missing there."""
    said, go_on = threading.Event(), threading.Event()

    def act(end: Peer) -> None:
        end.receive()
        said.set()
        assert go_on.wait(20)
        end.send(Welcome())
        with pytest.raises((EOFError, ConnectionResetError)):
            end.until(Switch)

    daemon, qmp = source
    mirror(qmp, short_path)
    with destination(short_path / "guest", act) as uri:
        qmp.call("migrate", {"uri": uri, "x-hand-over": {"mirrors": ["m"]}})
        assert said.wait(20)
        qmp.execute("block-job-cancel", device="m")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        qemu_io(daemon.uri("disk"), "write -P 1 0 64k", format="raw")
        go_on.set()
        state = ended(qmp)
    assert (state["status"], status(qmp)) == ("failed", "running")
    assert "mirror 'm' ended before the guest was held" in state["error-desc"]


def test_a_mirror_that_waits_to_be_finalized_is_finalized(source: tuple[Daemon, Qmp], short_path: Path) -> None:
    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        end.until(Switch)
        end.send(Activated())
        end.until(Go)
        end.send(Running())

    daemon, qmp = source
    image = mirror(qmp, short_path, **{"auto-finalize": False})
    qmp.execute("block-job-set-speed", device="m", speed=1)
    # Two writes: after the first piece the job waits for its speed, and has the second still to do.
    qemu_io(daemon.uri("disk"), "write -P 1 0 64k", "write -P 2 1M 64k", "write -P 3 2M 64k", format="raw")
    with destination(short_path / "guest", act) as uri:
        qmp.call("migrate", {"uri": uri, "x-hand-over": {"mirrors": ["m"]}})
        assert ended(qmp)["status"] == "completed"
    assert qmp.execute("query-jobs") == []
    qmp.execute("blockdev-del", node_name="m")
    qemu_io(image, "read -P 1 0 64k", "read -P 2 1M 64k", "read -P 3 2M 64k")


def test_the_command_settles_a_hand_over_whose_last_word_was_lost(
    source: tuple[Daemon, Qmp], target: tuple[Daemon, Qmp], short_path: Path
) -> None:
    """`livedisk migrate`, run again: it takes the guest back only if this destination is known not to have it."""

    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        end.until(Switch)
        end.send(Activated())
        end.receive()

    (here, qmp), (there, other) = source, target
    with destination(short_path / "lost", act) as uri:
        qmp.execute("migrate", uri=uri)
        assert "did not confirm" in ended(qmp)["error-desc"]
    command = ["migrate", "--from", here.qmp_socket, "--to", there.qmp_socket]
    qmp.close()
    other.close()
    assert "it is not known whether another daemon has it" in livedisk(*command, expect=3).stderr
    with there.qmp() as again:
        with speaking(listening(again, short_path)) as end:
            end.send(hello())
            assert end.receive() == Welcome()
        assert ended(again)["status"] == "failed"
    assert "it is back on the source" in livedisk(*command, expect=1).stderr
    with here.qmp() as again:
        assert status(again) == "running"


def test_an_image_that_somebody_else_has_is_not_taken_back(source: tuple[Daemon, Qmp], short_path: Path) -> None:
    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        end.until(Switch)
        end.send(Activated())
        end.receive()
        end.send(Running())

    _, qmp = source
    with destination(short_path / "guest", act) as uri:
        qmp.execute("migrate", uri=uri)
        assert ended(qmp)["status"] == "completed"
    given_up(qmp)
    node = f"driver=qcow2,node-name=d,file.driver=file,file.filename={short_path}/d.qcow2"
    other = Daemon(short_path, "--blockdev", node, "--device", "virtio-blk,drive=d", name="other", nbd=False)
    with other, other.qmp():  # its monitor speaks when all is open
        assert "lock" in asked(qmp, "cont")
        assert status(qmp) == "postmigrate"
    qmp.execute("cont")
    assert status(qmp) == "running"


def test_cancelled_while_it_is_held(source: tuple[Daemon, Qmp], short_path: Path) -> None:
    def act(end: Peer) -> None:
        end.receive()
        end.send(Welcome())
        with pytest.raises((EOFError, ConnectionResetError)):
            end.receive()

    daemon, qmp = source
    switched = [{"capability": name, "state": True} for name in ("events", "pause-before-switchover")]
    qmp.execute("migrate-set-capabilities", capabilities=switched)
    with destination(short_path / "guest", act) as uri:
        qmp.execute("migrate", uri=uri)
        qmp.wait_event("MIGRATION", lambda data: data["status"] == "pre-switchover")
        qmp.execute("migrate_cancel")
        assert ended(qmp)["status"] == "cancelled"
    assert status(qmp) == "running"
    qemu_io(daemon.uri("disk"), "write -P 1 0 64k", format="raw")


def test_a_capability_without_a_meaning_here_is_refused(source: tuple[Daemon, Qmp]) -> None:
    wanted = [{"capability": "events", "state": True}, {"capability": "xbzrle", "state": True}]
    assert "'xbzrle' is not supported" in asked(source[1], "migrate-set-capabilities", capabilities=wanted)
    states = source[1].execute("query-migrate-capabilities")
    assert not any(one["state"] for one in states)


@pytest.mark.parametrize("over", [{"mirrors": ["nobody"]}, {"exports": ["nobody"]}])
def test_what_is_not_there_cannot_go_along(source: tuple[Daemon, Qmp], short_path: Path, over: dict[str, Any]) -> None:
    said = asked(source[1], "migrate", **{"uri": f"unix:{short_path}/x", "x-hand-over": over})
    assert "nobody" in said
    assert source[1].execute("query-migrate") == {}


# -- a destination, and sources made by hand -----------------------------------------------------------------------------


@pytest.fixture
def target(short_path: Path) -> Iterator[tuple[Daemon, Qmp]]:
    """A daemon with the node of a disk, waiting for a guest."""
    image = create(short_path / "t.qcow2", SIZE)
    node = f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}"
    with Daemon(short_path, "--blockdev", node, "-incoming", "defer", name="target") as daemon, daemon.qmp() as qmp:
        yield daemon, qmp


def listening(qmp: Qmp, short_path: Path) -> str:
    path = f"{short_path}/guest"
    qmp.call("migrate-incoming", {"uri": f"unix:{path}", "exit-on-error": False})
    return path


@contextmanager
def speaking(path: str) -> Iterator[Peer]:
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.connect(path)
        sock.sendall(MAGIC)
        yield Peer(sock)


def disk(**changes: Any) -> Disk:
    options = {"driver": "virtio-blk", "id": "virtio0", "drive": "d", "serial": "s1"}
    usual = {"path": "/machine/peripheral/virtio0", "node": "d", "size": SIZE, "read_only": False, "options": options}
    return Disk(**{**usual, **changes})  # type: ignore[arg-type]


def hello(**changes: Any) -> Hello:
    return Hello(**{"version": wire.VERSION, "disks": [disk()], "exports": [], **changes})


def test_a_guest_is_taken(target: tuple[Daemon, Qmp], short_path: Path) -> None:
    daemon, qmp = target
    served = wire.Served("disk", "disk", "", True, "/machine/peripheral/virtio0", "d")
    with speaking(listening(qmp, short_path)) as end:
        end.send(hello(exports=[served]))
        assert end.receive() == Welcome()
        end.send(DeviceState("/machine/peripheral/virtio0", write_cache=False), Switch([]))
        assert end.receive() == Activated()
        assert status(qmp) == "inmigrate"
        end.send(Go(running=True))
        assert end.receive() == Running()
    assert status(qmp) == "running"
    assert ended(qmp)["status"] == "completed"
    qemu_io(daemon.uri("disk"), "write -P 1 0 64k", format="raw")
    assert [entry["qdev"] for entry in qmp.execute("query-block")] == ["/machine/peripheral/virtio0/virtio-backend"]


@pytest.mark.parametrize("step", ["magic", "hello", "switch", "activated"])
def test_a_source_that_vanishes_leaves_nothing(target: tuple[Daemon, Qmp], short_path: Path, step: str) -> None:
    _, qmp = target
    path = listening(qmp, short_path)
    served = wire.Served("disk", "disk", "", True, "/machine/peripheral/virtio0", "d")
    bits = Bitmap("d", "b", 65536, SIZE, 0, False, True)
    with speaking(path) as end:
        if step != "magic":
            end.send(hello(exports=[served]))
            end.receive()
        if step in ("switch", "activated"):
            packed = zlib.compress(b"\1" * (SIZE // 65536 // 8))
            end.send(msgspec.structs.replace(bits, length=len(packed)), BitmapBits(packed))
        if step == "activated":
            end.send(Switch([]))
            assert end.receive() == Activated()
    assert ended(qmp)["status"] == "failed"
    assert status(qmp) == "inmigrate"
    assert qmp.execute("query-block") == []
    assert qmp.execute("query-block-exports") == []
    (node,) = [node for node in qmp.execute("query-named-block-nodes", flat=True) if node["node-name"] == "d"]
    assert "dirty-bitmaps" not in node
    # And another can come.
    with speaking(listening(qmp, short_path)) as end:
        end.send(hello())
        assert end.receive() == Welcome()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 99}, "speaks version 99"),
        ({"disks": [disk(node="other")]}, "needs a node 'other', which is not here"),
        ({"disks": [disk(size=512)]}, f"has {SIZE} bytes here, 512 on the source"),
        ({"exports": [wire.Served("e", "e", "", True, "", "other")]}, "export 'e' needs a node 'other'"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    target: tuple[Daemon, Qmp], short_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with speaking(listening(target[1], short_path)) as end:
        end.send(hello(**changes))
        refusal = end.receive()
        assert isinstance(refusal, Refusal)
        assert reason in refusal.reason
    assert reason in ended(target[1])["error-desc"]


@pytest.mark.parametrize(
    "messages",
    [
        [BitmapBits(b"x")],
        [Go(running=True)],
        [Bitmap("d", "b", 65536, SIZE, 4, False, True), BitmapBits(b"12345")],
        [Bitmap("d", "b", 65536, SIZE, 4, False, True), BitmapBits(b"1234"), Switch([])],
        [Bitmap("d", "b", 65536, 512, 0, False, True), Switch([])],
        [Bitmap("x", "b", 65536, SIZE, 0, False, True), Switch([])],
        [Bitmap("d", "b", 0, SIZE, 0, False, True)],
        [Bitmap("d", "b", 65537, SIZE, 0, False, True)],
        [Bitmap("d", "b", 65536, -SIZE, 0, False, True)],
        [Bitmap("d", "b", 65536, SIZE, 1 << 40, False, True)],
        [DeviceState("/nobody", write_cache=True), Switch([])],
        [Switch(["nobody"])],
    ],
)
def test_nonsense_from_a_source_is_refused(target: tuple[Daemon, Qmp], short_path: Path, messages: list[Any]) -> None:
    _, qmp = target
    with speaking(listening(qmp, short_path)) as end:
        end.send(hello())
        assert end.receive() == Welcome()
        end.send(*messages)
        assert isinstance(end.receive(), Refusal)
    assert ended(qmp)["status"] == "failed"
    assert (status(qmp), qmp.execute("query-block")) == ("inmigrate", [])


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.0\r\n\r\n", b"livedisk-migratX"])
def test_somebody_who_only_looks_is_let_go(target: tuple[Daemon, Qmp], short_path: Path, data: bytes) -> None:
    path = listening(target[1], short_path)
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.connect(path)
        sock.sendall(data)
    with speaking(path) as end:
        end.send(hello())
        assert end.receive() == Welcome()


def test_migration_over_tls(short_path: Path, tmp_path: Path) -> None:
    folder = certificates.folder(tmp_path / "tls")
    bad = certificates.folder(tmp_path / "bad", client_cert=certificates.client_certificate(issuer="other"))
    options = [f"tls-creds-x509,id={{}},dir={{}},endpoint={end}" for end in ("client", "server")]
    with (
        Machine(
            short_path,
            "ours",
            "s",
            *("--object", options[0].format("c", folder)),
            *("--object", options[0].format("x", bad) + ",sanity-check=off"),
        ) as a,
        Machine(short_path, "ours", "t", "-incoming", "defer", "--object", options[1].format("s", folder)) as b,
        Qmp(a.socket) as source,
        Qmp(b.socket) as there,
    ):
        there.call("migrate-set-parameters", {"tls-creds": "s"})
        there.call("migrate-incoming", {"uri": "tcp:127.0.0.1:0", "exit-on-error": False})
        port = there.execute("query-migrate")["socket-address"][0]["port"]
        uri = f"tcp:127.0.0.1:{port}"
        for creds, outcome in {"": "failed", "x": "failed", "c": "completed"}.items():
            source.call("migrate-set-parameters", {"tls-creds": creds})
            assert source.execute("query-migrate-parameters")["tls-creds"] == creds
            source.execute("migrate", uri=uri)
            assert ended(source)["status"] == outcome, ended(source)
        assert status(there) == "running"


def test_until_the_guest_comes_its_disks_are_others_to_fill(short_path: Path) -> None:
    """A destination as QEMU's page starts it: the device is there, and so is a writable export of its node."""
    image = create(short_path / "d.qcow2", SIZE)
    node = f"driver=qcow2,node-name=d,file.driver=file,file.filename={image}"
    disk = ("--blockdev", node, "--device", "virtio-blk,drive=d,id=virtio0")
    with Daemon(short_path, *disk, "-incoming", "defer", "-S") as daemon, daemon.qmp() as qmp:
        qmp.call("nbd-server-add", {"device": "d", "writable": True})
        qemu_io(daemon.uri("d"), "write -P 1 0 64k", format="raw")
        with speaking(listening(qmp, short_path)) as end:
            end.send(hello(disks=[]), Switch([]))
            assert end.receive() == Welcome()
            refusal = end.receive()
            assert isinstance(refusal, Refusal)
            assert "Permission conflict on node 'd'" in refusal.reason
        assert ended(qmp)["status"] == "failed"
        qemu_io(daemon.uri("d"), "write -P 1 0 64k", format="raw")
        with speaking(listening(qmp, short_path)) as end:
            end.send(hello(disks=[]), Switch(["d"]))
            assert end.receive() == Welcome()
            assert end.receive() == Activated()
            end.send(Go(running=True))
            assert end.receive() == Running()
        # -S: it waits for cont.
        assert status(qmp) == "paused"
        qmp.execute("cont")
        assert status(qmp) == "running"


def test_images_that_the_source_has_are_inactive_again_after_a_refusal(short_path: Path) -> None:
    """Both opened one image. The source's lock refuses the destination; without the source it has the guest's disk at once."""
    create(short_path / "d.qcow2", str(SIZE))
    node = "driver=qcow2,node-name=d,file.driver=file,file.filename=d.qcow2"
    disk = ("--blockdev", node, "--device", "virtio-blk,drive=d,id=virtio0")

    def active(qmp: Qmp) -> set[bool]:
        return {one["active"] for one in qmp.execute("query-named-block-nodes", flat=True)}

    with (
        short_folder() as other,
        Daemon(other, *disk, "-incoming", "defer", cwd=short_path) as there,
        Qmp(there.qmp_socket) as target,
    ):
        target.execute("migrate-incoming", uri=f"unix:{other}/guest", exit_on_error=False)
        with Daemon(short_path, *disk, cwd=short_path) as here, Qmp(here.qmp_socket) as source:
            assert active(target) == {False}
            source.execute("migrate", uri=f"unix:{other}/guest")
            assert 'Failed to get "' in ended(source)["error-desc"]
            assert (status(source), active(source)) == ("running", {True})
            assert ended(target)["status"] == "failed"
            assert (status(target), active(target)) == ("inmigrate", {False})
        with Daemon(short_path) as empty, Qmp(empty.qmp_socket) as source:
            target.execute("migrate-incoming", uri=f"unix:{other}/guest", exit_on_error=False)
            source.execute("migrate", uri=f"unix:{other}/guest")
            assert ended(source)["status"] == "completed"
        assert ended(target)["status"] == "completed"
        assert (status(target), active(target)) == ("running", {True})
