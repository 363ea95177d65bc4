"""Storage migration as QEMU's page "Live Block Device Operations" has it: a mirror into the other instance's NBD server, under
write load, between livedisk and livedisk, livedisk and QEMU, QEMU and livedisk.

    destination                                source
    nbd-server-start inet ::                   drive-mirror mode=existing sync=top target=nbd:...
    nbd-server-add writable                    ... BLOCK_JOB_READY
                                               block-job-cancel, BLOCK_JOB_COMPLETED
    nbd-server-stop, cont                      quit

Then what can go wrong on the way: connections that are cut, a destination that dies, fills up or stalls. Nothing that the
client was told to be written is lost, and the job says which side it was.

Source: QEMU ``docs/interop/live-block-operations.rst``, "QMP invocation for live storage migration with drive-mirror + NBD".
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.cutter import Cutter
from kit.livedisk import Daemon, executable
from kit.nbdkit import Nbdkit
from kit.peers import peer
from kit.places import free_port
from kit.process import Process
from kit.qemu import QemuNbd, check, create, read_all
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


# -- faults ------------------------------------------------------------------------------------------------------------


@contextmanager
def mirrored_source(folder: Path) -> Iterator[tuple[Instance, Writer]]:
    """A livedisk with a disk that a client writes to."""
    image = create(folder / "source.qcow2", SIZE)
    with (
        instance(folder, "source", ours=True, image=image, fmt="qcow2") as source,
        Writer(source.serve_guest(), SIZE, folder, **LOAD) as writer,
    ):
        yield source, writer


def mirror_to(source: Instance, socket: Path, *, export: str = "", delay: int = 0, **options: Any) -> None:
    server = {"type": "unix", "path": str(socket)}
    source.qmp.execute(
        "blockdev-add", driver="nbd", node_name="target", server=server, export=export, reconnect_delay=delay
    )
    source.qmp.execute("blockdev-mirror", device="disk", target="target", sync="full", job_id="job0", **options)


def offset_of(qmp: Qmp) -> int:
    jobs: list[dict[str, Any]] = qmp.execute("query-block-jobs")
    return int(jobs[0]["offset"])


def wait_for_offset(qmp: Qmp, offset: int) -> None:
    deadline = time.monotonic() + 60
    while offset_of(qmp) < offset:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish_copy(source: Instance, writer: Writer, copy: Path, folder: Path, *, ready: bool = False) -> None:
    """READY (unless it was waited for), the client ends, the mirror ends; source and copy have every write that was
    acknowledged."""
    if not ready:
        source.qmp.wait_event("BLOCK_JOB_READY", timeout=120)
    history = writer.finish()
    source.qmp.execute("block-job-cancel", device="job0")
    assert "error" not in source.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
    source.qmp.execute("blockdev-del", node_name="target")
    source.qmp.execute("quit")
    source.wait()
    history.check_final(read_all(folder / "source.qcow2", folder))
    history.check_final(copy.read_bytes())


@pytest.mark.slow
def test_a_mirror_goes_on_after_the_destination_was_killed_and_came_back(short_path: Path) -> None:
    copy = short_path / "copy"
    copy.write_bytes(b"\xff" * SIZE)
    with mirrored_source(short_path) as (source, writer):
        with QemuNbd(short_path, copy, name="t") as target:
            mirror_to(source, target.socket, delay=60, speed=40 << 20)
            wait_for_offset(source.qmp, SIZE // 4)
            target.kill()
        done = offset_of(source.qmp)
        time.sleep(0.5)
        assert source.qmp.execute("query-block-jobs")[0]["status"] == "running"
        with QemuNbd(short_path, copy, name="t"):
            source.qmp.execute("block-job-set-speed", device="job0", speed=0)
            assert offset_of(source.qmp) >= done
            finish_copy(source, writer, copy, short_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mirror_through_a_connection_that_is_cut_again_and_again(seed: int, short_path: Path) -> None:
    copy = short_path / "copy"
    copy.write_bytes(b"\xff" * SIZE)
    served = f"driver=raw,node-name=copy,discard=unmap,file.driver=file,file.filename={copy}"
    with (
        mirrored_source(short_path) as (source, writer),
        Daemon(short_path, "--blockdev", served, "--export", "nbd,id=e,node-name=copy,name=copy,writable=on") as target,
        Cutter(short_path / "cut", target.nbd_socket, mean=4 << 20, seed=seed) as cutter,
    ):
        mirror_to(source, short_path / "cut", export="copy", delay=60)
        wait_for_offset(source.qmp, 1)
        cutter.cut()
        source.qmp.wait_event("BLOCK_JOB_READY", timeout=120)
        for _ in range(5):
            time.sleep(0.1)
            cutter.cut()
        finish_copy(source, writer, copy, short_path, ready=True)
        assert cutter.cuts >= 3


def test_a_destination_that_dies_fails_the_job_and_not_the_guest(short_path: Path) -> None:
    copy = short_path / "copy"
    copy.write_bytes(bytes(SIZE))
    with mirrored_source(short_path) as (source, writer):
        with QemuNbd(short_path, copy, name="t") as target:
            mirror_to(source, target.socket)
            source.qmp.wait_event("BLOCK_JOB_READY", timeout=60)
            target.kill()
            error = source.qmp.wait_event("BLOCK_JOB_ERROR", timeout=60)
            assert (error["operation"], error["action"]) == ("write", "report")
            assert source.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)["error"] == "Input/output error"
        history = writer.finish()
        source.qmp.execute("blockdev-del", node_name="target")
        source.qmp.execute("quit")
        source.wait()
        assert "NBD server" in source.output()
    history.check_final(read_all(short_path / "source.qcow2", short_path))


def test_a_destination_that_is_full_holds_the_job_until_there_is_room(short_path: Path) -> None:
    full, copy = short_path / "full", short_path / "copy"
    full.touch()
    copy.write_bytes(bytes(SIZE))
    arguments = ("file", str(copy), "error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={full}")
    with (
        mirrored_source(short_path) as (source, writer),
        Nbdkit(short_path, "--filter=error", *arguments) as target,
    ):
        mirror_to(source, target.socket, on_target_error="enospc")
        error = source.qmp.wait_event("BLOCK_JOB_ERROR", timeout=60)
        assert (error["operation"], error["action"]) == ("write", "stop")
        source.qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "paused", timeout=60)
        assert source.qmp.execute("query-block-jobs")[0]["io-status"] == "nospace"
        full.unlink()
        source.qmp.execute("block-job-resume", device="job0")
        finish_copy(source, writer, copy, short_path)


@pytest.mark.parametrize("way", ["cancel", "yank"])
def test_a_destination_that_is_away_or_stalls_can_be_given_up(way: str, short_path: Path) -> None:
    copy = short_path / "copy"
    copy.write_bytes(bytes(SIZE))
    with mirrored_source(short_path) as (source, writer), QemuNbd(short_path, copy, name="t") as target:
        mirror_to(source, target.socket, delay=3600, speed=8 << 20)
        wait_for_offset(source.qmp, 1 << 20)
        if way == "yank":
            target.signal(signal.SIGSTOP)
            source.qmp.execute("block-job-set-speed", device="job0", speed=0)
            time.sleep(0.2)
            source.qmp.execute("yank", instances=[{"type": "block-node", "node-name": "target"}])
            assert "error" in source.qmp.wait_event("BLOCK_JOB_COMPLETED", timeout=60)
            target.signal(signal.SIGCONT)
        else:
            target.kill()
            time.sleep(0.2)
            source.qmp.execute("block-job-cancel", device="job0", force=True)
            source.qmp.wait_event("BLOCK_JOB_CANCELLED", timeout=60)
        history = writer.finish()
        source.qmp.execute("blockdev-del", node_name="target")
        source.qmp.execute("quit")
        source.wait()
    history.check_final(read_all(short_path / "source.qcow2", short_path))
