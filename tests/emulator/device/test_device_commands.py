"""The same QMP scripts to qemu-system-x86_64 and to ours: device_add, run state, statistics."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kit import libnbd
from kit.livedisk import executable
from kit.peers import peer
from kit.places import short_folder
from kit.process import Process
from kit.qemu import create, read_all
from kit.qmp import Qmp, QmpError

NODES = (
    *("-blockdev", "null-co,node-name=n,size=1048576"),
    *("-blockdev", "null-co,node-name=m,size=1048576"),
    *("-blockdev", "null-co,node-name=ro,size=1048576,read-only=on"),
    *("-device", "virtio-blk,drive=n,id=virtio0,serial=abc"),
)


class Machine(Process):
    """QEMU, or ours in its place, with a QMP socket; the guest does not run."""

    def __init__(self, folder: Path, command: list[str], *options: str) -> None:
        self.qmp_socket = folder / "qmp"
        qmp = ["-qmp", f"unix:{self.qmp_socket},server=on,wait=off"]
        machine = ["-machine", "pc", "-nodefaults", "-display", "none"]
        super().__init__([*command, *machine, *qmp, *options], log=folder / "log")
        try:
            self.wait_for_socket(self.qmp_socket)
        except BaseException:
            self.kill()
            raise


def qemu() -> list[str]:
    return [peer("qemu-system-x86_64"), "-accel", "tcg"]


def ours() -> list[str]:
    return [executable(), "daemon"]


def device_add(**arguments: Any) -> tuple[str, dict[str, Any]]:
    return "device_add", {"driver": "virtio-blk-pci", **arguments}


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("query-status", {}),
    device_add(drive="m", id="d2", foo=1),
    device_add(drive="m", id="d2", logical_block_size=513),
    device_add(drive="m", id="d2", logical_block_size="4k"),
    device_add(drive="m", id="d2", logical_block_size=4096, physical_block_size=512),
    device_add(drive="m", id="d2", **{"num-queues": 0}),
    device_add(drive="m", id="d2", **{"num-queues": -3}),
    device_add(drive="m", id="d2", **{"queue-size": 3}),
    device_add(drive="m", id="d2", werror="foo"),
    device_add(drive="m", id="d2", **{"write-cache": True}),
    device_add(drive="m", id="d2", **{"share-rw": "foo"}),
    device_add(drive="nope", id="d2"),
    device_add(id="d2"),
    device_add(drive="n", id="d2"),
    device_add(drive="m", id="virtio0"),
    device_add(drive="m", id="d2", min_io_size=1000),
    device_add(drive="m", id="d2", **{"max-discard-sectors": 0}),
    device_add(drive="m", id="d2", iothread="nope"),
    ("device_add", {"driver": "nope", "drive": "m"}),
    ("device_add", {"drive": "m"}),
    device_add(drive="m", id="d2", rerror="enospc", serial="x"),
    device_add(drive="ro"),
    # A device's id is no name of a block backend: a node may have the same.
    ("blockdev-add", {"driver": "null-co", "node-name": "virtio0", "size": 512}),
    ("blockdev-del", {"node-name": "virtio0"}),
    ("query-block", {}),
    ("device_del", {"id": "nope"}),
    ("blockdev-del", {"node-name": "m"}),
    ("stop", {}),
    ("query-status", {}),
    ("cont", {}),
    ("query-status", {}),
    ("stop", {}),
    ("stop", {}),
    ("query-status", {}),
    ("query-blockstats", {}),
    ("query-blockstats", {"query-nodes": True}),
]


def play(command: list[str]) -> list[Any]:
    seen: list[Any] = []
    with short_folder() as folder, Machine(folder, command, "-S", *NODES) as machine, Qmp(machine.qmp_socket) as qmp:
        for name, arguments in STEPS:
            try:
                seen.append((name, arguments, qmp.call(name, arguments)))
            except QmpError as error:
                seen.append((name, arguments, error.kind, error.desc))
            seen.extend((event["event"], event.get("data")) for event in qmp.events)
            qmp.events.clear()
    return seen


def comparable(value: Any) -> Any:
    """Without the sums, which differ because a machine's firmware reads the disk."""
    if isinstance(value, dict):
        return {
            key: 0 if key.startswith(("rd_", "wr_")) else comparable(inner)
            for key, inner in value.items()
            if key != "idle_time_ns"
        }
    return [comparable(inner) for inner in value] if isinstance(value, list | tuple) else value


def test_devices_and_run_state_answer_as_qemu_answers() -> None:
    theirs, mine = play(qemu()), play(ours())
    for one, other in zip(theirs, mine, strict=True):
        assert comparable(other) == comparable(one)


@pytest.mark.parametrize("options", [(), ("-S",)])
def test_the_documented_command_line_serves_its_device(short_path: Path, options: tuple[str, ...]) -> None:
    image = short_path / "a.raw"
    image.write_bytes(bytes(1 << 20))
    line = (
        *("-blockdev", f"node-name=node-A,driver=raw,file.driver=file,file.node-name=file,file.filename={image}"),
        *("-device", "virtio-blk,drive=node-A,id=virtio0"),
    )
    with Machine(short_path, ours(), *line, *options) as machine, Qmp(machine.qmp_socket) as qmp:
        socket = short_path / "nbd"
        qmp.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
        qmp.execute("nbd-server-add", device="virtio0", writable=True)
        if options:
            qmp.execute("cont")
        libnbd.script(f"nbd+unix:///virtio0?socket={socket}", 'h.pwrite(b"guest" * 1024, 0); h.flush()')
        (stats,) = qmp.execute("query-blockstats")
        assert stats["stats"]["wr_bytes"] == 5120
        assert stats["stats"]["flush_operations"] == 1
        assert stats["stats"]["wr_highest_offset"] == 5120
        assert stats["parent"]["node-name"] == "file"
        qmp.execute("device_del", id="virtio0")
        assert [event["event"] for event in qmp.events if event["event"] != "RESUME"] == [
            "BLOCK_EXPORT_DELETED",
            "DEVICE_DELETED",
            "DEVICE_DELETED",
        ]
        assert qmp.execute("query-block") == []
        qmp.execute("blockdev-del", node_name="node-A")
    assert image.read_bytes()[:5120] == b"guest" * 1024


def test_a_write_that_the_host_refuses_stops_the_guest_until_there_is_room(short_path: Path) -> None:
    image, socket = short_path / "a.raw", short_path / "nbd"
    image.write_bytes(bytes(1 << 20))
    line = (
        *("-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={image}"),
        *("-device", "virtio-blk,drive=disk,id=virtio0,werror=stop"),
    )
    with Machine(short_path, ours(), *line) as machine, Qmp(machine.qmp_socket) as qmp:
        qmp.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
        qmp.execute("nbd-server-add", device="virtio0", writable=True)
        pid, limit = machine.child.pid, resource.RLIMIT_FSIZE
        before = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (1 << 19, before[1]))  # a full disk, as far as this process can tell
        code = f"""
            h.connect_uri("nbd+unix:///virtio0?socket={socket}")
            for n in range(64):
                h.pwrite(bytes([n]) * 4096, 1 << 19)
            result = "written"
            """
        with ThreadPoolExecutor(1) as pool:
            write = pool.submit(libnbd.script, None, code)
            event = qmp.wait_event("BLOCK_IO_ERROR")
            assert event == {
                "qom-path": "/machine/peripheral/virtio0/virtio-backend",
                "device": "",
                "node-name": "disk",
                "operation": "write",
                "action": "stop",
                "nospace": False,
                "reason": "File too large",
            }
            qmp.wait_event("STOP")
            assert qmp.execute("query-status") == {"running": False, "status": "io-error"}
            (info,) = qmp.execute("query-block")
            assert info["io-status"] == "failed"
            assert not write.done()
            resource.prlimit(pid, limit, before)
            qmp.execute("cont")
            assert write.result(30) == "written"
        (info,) = qmp.execute("query-block")
        assert info["io-status"] == "ok"
        assert image.read_bytes()[1 << 19 : (1 << 19) + 4096] == bytes([63]) * 4096


def test_stop_flushes_every_disk_although_one_cannot_be(short_path: Path) -> None:
    for name in "ab":
        create(short_path / f"{name}.qcow2", 1 << 20)
    broken = f"image.filename={short_path}/a.qcow2,inject-error.0.event=flush_to_disk,inject-error.0.errno=5"
    line = (
        *(
            "-blockdev",
            f"qcow2,node-name=a,file.driver=blkdebug,file.image.driver=file,file.{broken.replace(',', ',file.')}",
        ),
        *("-blockdev", f"qcow2,node-name=b,file.driver=file,file.filename={short_path}/b.qcow2"),
        *("-device", "virtio-blk,drive=a,id=va", "-device", "virtio-blk,drive=b,id=vb"),
    )
    socket = short_path / "nbd"
    with Machine(short_path, ours(), *line) as machine, Qmp(machine.qmp_socket) as qmp:
        qmp.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(socket)}}})
        for name in "ab":
            qmp.execute("nbd-server-add", device=f"v{name}", name=name, writable=True)
            libnbd.script(f"nbd+unix:///{name}?socket={socket}", f'h.pwrite(b"{name}" * 65536, 0)')
        qmp.execute("stop")
        machine.kill()
        assert "flushing after stop failed: [Errno 5] Input/output error" in machine.output()
    assert read_all(short_path / "b.qcow2", short_path)[:65536] == b"b" * 65536
