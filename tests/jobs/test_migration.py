"""Storage migration as QEMU's page "Live Block Device Operations" has it: a mirror into the other instance's NBD server, under
write load, between livedisk and livedisk, livedisk and QEMU, QEMU and livedisk.

    destination                                source
    nbd-server-start inet ::                   drive-mirror mode=existing sync=top target=nbd:...
    nbd-server-add writable                    ... BLOCK_JOB_READY
                                               block-job-cancel, BLOCK_JOB_COMPLETED
    nbd-server-stop, cont                      quit

Source: QEMU ``docs/interop/live-block-operations.rst``, "QMP invocation for live storage migration with drive-mirror + NBD".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import executable
from kit.peers import peer
from kit.places import free_port
from kit.process import Process
from kit.qemu import check, create, read_all
from kit.qmp import Qmp
from kit.writer import Writer, now

SIZE = 64 << 20
LOAD: dict[str, Any] = {"depth": 2, "pause": 0.01}
"""Some hundred writes a second: a mirror in the background catches up with that."""
MACHINE = ("-display", "none", "-no-user-config", "-nodefaults", "-m", "64", "-machine", "none", "-accel", "tcg")


class Instance(Process):
    """An emulator with one disk, node ``disk``, in the file ``image``; ``ours``: livedisk, else QEMU."""

    def __init__(self, folder: Path, name: str, *options: str, ours: bool, image: Path, fmt: str) -> None:
        program = [executable(), "daemon"] if ours else [peer("qemu-system-x86_64")]
        disk = f"node-name=disk,driver={fmt},discard=unmap,file.driver=file,file.filename={image}"
        self.qmp_socket, self.nbd = folder / f"{name}.qmp", folder / f"{name}.nbd"
        qmp = f"unix:{self.qmp_socket},server=on,wait=off"
        super().__init__(
            [*program, *MACHINE, "-blockdev", disk, "-qmp", qmp, *options], log=folder / f"{name}.log", cwd=folder
        )
        self.wait_for_socket(self.qmp_socket)
        self.qmp = Qmp(self.qmp_socket, timeout=60)

    def serve_guest(self) -> str:
        """Let the guest in, by NBD; returns its URI."""
        address = {"type": "unix", "data": {"path": str(self.nbd)}}
        self.qmp.execute("nbd-server-start", addr=address)
        self.qmp.execute("block-export-add", type="nbd", id="guest", node_name="disk", name="guest", writable=True)
        return f"nbd+unix:///guest?socket={self.nbd}"


@contextmanager
def instance(folder: Path, name: str, *options: str, **how: Any) -> Iterator[Instance]:
    with Instance(folder, name, *options, **how) as made, made.qmp:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source_is_ours", "target_is_ours"),
    [(True, True), (True, False), (False, True)],
    ids=["both", "to-qemu", "from-qemu"],
)
@pytest.mark.parametrize("by_name", [True, False], ids=["drive-mirror", "blockdev-mirror"])
def test_a_disk_moves_while_it_is_written(
    source_is_ours: bool, target_is_ours: bool, by_name: bool, short_path: Path
) -> None:
    images = create(short_path / "source.qcow2", SIZE), create(short_path / "target.qcow2", SIZE)
    port = str(free_port("::"))
    with (
        instance(short_path, "source", ours=source_is_ours, image=images[0], fmt="qcow2") as source,
        instance(
            short_path, "target", "-incoming", "defer", "-S", ours=target_is_ours, image=images[1], fmt="qcow2"
        ) as target,
    ):
        writer = Writer(source.serve_guest(), SIZE, short_path, **LOAD)
        with writer:
            address = {"type": "inet", "data": {"host": "::", "port": port}}
            target.qmp.execute("nbd-server-start", addr=address)
            target.qmp.execute("nbd-server-add", device="disk", writable=True)
            time.sleep(0.3)
            start_mirror(source.qmp, port, by_name=by_name)
            source.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
            time.sleep(0.3)
            history = writer.finish()
        source.qmp.execute("block-job-cancel", device="job0")
        completed = source.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
        assert "error" not in completed
        if not by_name:
            source.qmp.execute("blockdev-del", node_name="target")
        target.qmp.execute("nbd-server-stop")
        source.qmp.execute("quit")
        source.wait()
        target.qmp.execute("quit")
        target.wait()
    assert len(history.writes) > 50
    for image in images:
        check(image)
        history.check_final(read_all(image, short_path))


def start_mirror(qmp: Qmp, port: str, *, by_name: bool) -> None:
    if by_name:
        name = f"nbd:localhost:{port}:exportname=disk"
        qmp.execute("drive-mirror", device="disk", target=name, sync="top", mode="existing", job_id="job0")
        return
    server = {"type": "inet", "host": "localhost", "port": port}
    qmp.execute("blockdev-add", driver="nbd", node_name="target", server=server, export="disk")
    qmp.execute("blockdev-mirror", device="disk", target="target", sync="full", job_id="job0")


def test_the_copy_is_of_the_moment_of_the_cancel(short_path: Path) -> None:
    """The guest, held by `stop`, writes on afterwards: the copy has what it was told before, and nothing of later."""
    images = create(short_path / "source.qcow2", SIZE), create(short_path / "target.qcow2", SIZE)
    port = str(free_port("::"))
    device = ("-device", "virtio-blk,drive=disk,id=virtio0")
    with (
        instance(short_path, "source", *device, ours=True, image=images[0], fmt="qcow2") as source,
        instance(short_path, "target", "-incoming", "defer", "-S", ours=True, image=images[1], fmt="qcow2") as target,
    ):
        source.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(source.nbd)}})
        source.qmp.execute("nbd-server-add", device="virtio0", name="guest", writable=True)
        with Writer(f"nbd+unix:///guest?socket={source.nbd}", SIZE, short_path, **LOAD) as writer:
            target.qmp.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "::", "port": port}})
            target.qmp.execute("nbd-server-add", device="disk", writable=True)
            start_mirror(source.qmp, port, by_name=True)
            source.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
            time.sleep(0.2)
            before = now()
            source.qmp.execute("stop")
            after = now()
            source.qmp.execute("block-job-cancel", device="job0")
            source.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
            target.qmp.execute("nbd-server-stop")
            target.qmp.execute("cont")
            source.qmp.execute("cont")
            time.sleep(0.2)
            history = writer.finish()
        target.qmp.execute("quit")
        target.wait()
        source.qmp.execute("quit")
        source.wait()
    history.check_moment(read_all(images[1], short_path), before, after)
    history.check_final(read_all(images[0], short_path))
