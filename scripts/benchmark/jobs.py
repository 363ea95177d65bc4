"""The jobs beside qemu-storage-daemon: how fast they copy, and what they leave the guest.

Both daemons get the same QMP commands on the same disks, in turn, interleaved, page cache warm; every run starts a daemon of
its own on a fresh target. A *copy* row times a job from its command to its end (a mirror to BLOCK_JOB_READY, which includes its
flush). A *guest* row lets fio load the source's export while jobs run one after the other, and tells the guest's IOPS and the
jobs' bytes in that time. The *sparse* row mirrors a disk of 1 TiB that holds as little as the other sources.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmark.images import CLUSTER
from benchmark.measure import LoadFailed, Plan, Tell, fio, machine
from benchmark.servers import LiveDisk, QemuStorageDaemon, ServerFailed, qemu_aio

SPARSE: Final = 1 << 40
"""Bytes of the sparse disk."""
_STEP: Final = 1 << 20
_TRANSPORT: Final = {"unix": "Unix socket", "tcp": "TCP"}
_FILL: Final = b"\xa5" * _STEP


class _Empty(QemuStorageDaemon):
    """A daemon without nodes: they come by QMP."""

    def arguments(self, files: Any) -> list[str]:
        return [
            *self.executable(),
            *("--chardev", f"socket,id=c,path={self.qmp_socket},server=on,wait=off", "--monitor", "chardev=c"),
            *("--nbd-server", f"addr.type=unix,addr.path={self.nbd_socket},max-connections=16"),
        ]


class _EmptyLiveDisk(_Empty):
    name = LiveDisk.name

    @classmethod
    def executable(cls) -> list[str]:
        return LiveDisk.executable()


DAEMONS: Final = (_Empty, _EmptyLiveDisk)


class Monitor:
    """The least QMP client: commands, and waiting for events. Raises `ServerFailed` on an error reply."""

    def __init__(self, daemon: _Empty) -> None:
        self._socket = daemon.connect(daemon.qmp_socket)
        self._socket.settimeout(120)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._next()
        self.run("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ServerFailed("the daemon closed its monitor")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def run(self, command: str, **arguments: Any) -> Any:
        """``_`` in names stands for ``-``."""
        message = {"execute": command, "arguments": {name.replace("_", "-"): arg for name, arg in arguments.items()}}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while "event" in (reply := self._next()):
            self.events.append(reply)
        if "error" in reply:
            raise ServerFailed(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def wait(self, *names: str) -> str:
        """Until one of these events; its name. Raises ServerFailed if it tells of an error."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] in names:
                    if error := event["data"].get("error"):
                        raise ServerFailed(error)
                    return str(event["event"])
            self.events.append(self._next())

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True)
class Row:
    """``kind``: mirror, backup, stream, commit or active commit. ``source``, ``target``: formats. ``guest``: what fio does
    meanwhile ("randread", "randwrite"), or None. ``remote``: the target is an export of a second daemon of the same kind, over a
    Unix socket or TCP ("unix", "tcp"). ``wanted``: least ratio of MB/s, of the guest's IOPS."""

    kind: str
    source: str
    target: str
    guest: str | None = None
    sparse: bool = False
    remote: str = ""
    wanted: float = 2.0
    wanted_guest: float = 2.0

    @property
    def name(self) -> str:
        parts = [
            self.kind.replace(" ", "-"),
            self.source,
            self.target,
            "sparse" if self.sparse else "",
            self.guest or "",
        ]
        parts += ("remote", self.remote) if self.remote else ()
        return "-".join(part for part in parts if part)

    @property
    def title(self) -> str:
        what = f"{self.kind}, {self.source} to {self.target}"
        if self.sparse:
            return f"{what}, in 1 TiB"
        if self.remote:
            return f"{what}, to another daemon over NBD, {_TRANSPORT[self.remote]}"
        return f"{what}, while the guest does {self.guest}" if self.guest else what


ROWS: Final = (
    Row("mirror", "raw", "raw"),
    Row("mirror", "raw", "qcow2"),
    Row("mirror", "qcow2", "raw"),
    Row("mirror", "qcow2", "qcow2"),
    Row("backup", "raw", "qcow2"),
    Row("backup", "qcow2", "qcow2"),
    Row("stream", "raw", "qcow2"),
    Row("stream", "qcow2", "qcow2"),
    Row("commit", "qcow2", "raw"),
    Row("commit", "qcow2", "qcow2"),
    Row("active commit", "qcow2", "qcow2"),
    Row("mirror", "qcow2", "qcow2", sparse=True, wanted=1.0),
    Row("mirror", "raw", "raw", remote="unix", wanted=1.5),
    Row("mirror", "qcow2", "qcow2", remote="unix", wanted=1.5),
    Row("mirror", "raw", "raw", remote="tcp", wanted=1.5),
    Row("mirror", "qcow2", "qcow2", remote="tcp", wanted=1.5),
    Row("mirror", "raw", "qcow2", guest="randread", wanted=1.0),
    Row("mirror", "raw", "qcow2", guest="randwrite", wanted=1.0),
    Row("backup", "qcow2", "qcow2", guest="randread", wanted=1.0),
    Row("backup", "qcow2", "qcow2", guest="randwrite", wanted=1.0),
    Row("commit", "qcow2", "qcow2", guest="randread", wanted=1.0),
    Row("commit", "qcow2", "qcow2", guest="randwrite", wanted=1.0),
)


class Disks:
    """The disks of one call, in ``folder``: ``size`` bytes of random content, as raw and as qcow2 files."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        raw = folder / "source.raw"
        with raw.open("wb") as out:
            for _ in range(0, size, _STEP):
                out.write(os.urandom(_STEP))
        self._img("convert", "-f", "raw", "-O", "qcow2", raw, self.source("qcow2"))

    def source(self, format: str) -> Path:
        return self.folder / f"source.{format}"

    def sparse(self) -> Path:
        """1 TiB that holds the source's content in pieces, all over it."""
        path = self.folder / "sparse.qcow2"
        if not path.exists():
            self._img("create", "-q", "-f", "qcow2", path, SPARSE)
            pieces = 64
            piece = self.size // pieces
            commands = [
                part for n in range(pieces) for part in ("-c", f"write -q -P {n + 1} {n * (SPARSE // pieces)} {piece}")
            ]
            subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True, stdout=subprocess.DEVNULL)
        return path

    def empty(self, name: str, format: str, size: int, backing: Path | None = None) -> Path:
        """A new image, in a file that is as long as it will get and in the page cache: what is measured is the daemon, not how
        fast the machine finds pages for a file that grows (a virtual machine may have to ask its host for every one)."""
        path = self.folder / f"{name}.{format}"
        path.unlink(missing_ok=True)
        extra = ["-b", backing, "-F", backing.suffix[1:]] if backing is not None else []
        self._img("create", "-q", "-f", format, *extra, path, size)
        if size == self.size:
            with path.open("r+b") as out:
                begin = 0 if format == "raw" else out.seek(0, os.SEEK_END)
                for start in range(begin, size + (0 if format == "raw" else size // 256), _STEP):
                    os.pwrite(out.fileno(), _FILL, start)
        return path

    def above(self, base: Path) -> Path:
        """An overlay of ``base`` that holds all of the source's content."""
        path = self.folder / "above.qcow2"
        if not path.exists():
            shutil.copyfile(self.source("qcow2"), path)
        self._img("rebase", "-u", "-b", base, "-F", base.suffix[1:], path)
        return path

    def warm(self) -> None:
        """Put everything on the disk, and into the page cache."""
        buffer = bytearray(_STEP)
        for path in self.folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if os.fstat(descriptor).st_size <= 2 * self.size:
                    while os.readv(descriptor, [buffer]):
                        pass
            finally:
                os.close(descriptor)

    @staticmethod
    def _img(*arguments: object) -> None:
        subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Sample:
    """One run: the job's bytes a second, the guest's IOPS (0: no guest), the daemon's CPU seconds and highest resident
    bytes."""

    rate: float
    iops: float
    cpu: float
    peak: int


class Run:
    """One row on one daemon, once."""

    def __init__(self, row: Row, daemon: _Empty, disks: Disks, there: _Empty | None = None) -> None:
        self.row = row
        self.daemon = daemon
        self.there = there
        self.disks = disks
        self.size = disks.size
        self.monitor = Monitor(daemon)
        self._count = 0

    def _node(self, name: str, path: Path, *, backing: str | None = None, read_only: bool = False) -> str:
        driver = path.suffix[1:]
        file = {"driver": "file", "filename": str(path), "aio": qemu_aio()}
        extra: dict[str, Any] = {"backing": backing} if driver == "qcow2" else {}
        self.monitor.run("blockdev-add", driver=driver, node_name=name, file=file, read_only=read_only, **extra)
        return name

    def _far_node(self, name: str, path: Path, there: _Empty) -> None:
        """Open the image in the other daemon, and its export here."""
        monitor = Monitor(there)
        file = {"driver": "file", "filename": str(path), "aio": qemu_aio()}
        monitor.run("blockdev-add", driver=path.suffix[1:], node_name="t", file=file, discard="unmap")
        server: dict[str, Any] = {"type": "unix", "path": str(there.nbd_socket)}
        if self.row.remote == "tcp":
            server = {"type": "inet", "host": "127.0.0.1", "port": str(_free_port())}
            monitor.run("nbd-server-stop")
            monitor.run("nbd-server-start", addr={"type": "inet", "data": {k: server[k] for k in ("host", "port")}})
        monitor.run("block-export-add", type="nbd", id="t", node_name="t", name="t", writable=True)
        monitor.close()
        self.monitor.run("blockdev-add", driver="nbd", node_name=name, server=server, export="t")

    def prepare(self) -> Callable[[], None]:
        """Make and open the disks; gives what starts the job ``j``."""
        row, disks, run = self.row, self.disks, self.monitor.run
        auto = {"auto_finalize": row.guest is None}
        if row.kind in ("mirror", "backup"):
            path = disks.sparse() if row.sparse else disks.source(row.source)
            target = disks.empty("target", row.target, SPARSE if row.sparse else self.size)
            disks.warm()
            self._node("source", path)
            if self.there is None:
                self._node("target", target)
            else:
                self._far_node("target", target, self.there)
            command = f"blockdev-{row.kind}"
            return lambda: run(command, job_id="j", device="source", target="target", sync="full", **auto)
        if row.kind == "stream":
            base = disks.source(row.source)
            overlay = disks.empty("target", row.target, self.size, backing=base)
            disks.warm()
            self._node("base", base, read_only=True)
            self._node("source", overlay, backing="base")
            return lambda: run("block-stream", job_id="j", device="source", **auto)
        base = disks.empty("base", row.target, self.size)
        above = disks.above(base)
        active = disks.empty("active", "qcow2", self.size, backing=above)
        disks.warm()
        self._node("base", base, read_only=True)
        if row.kind == "active commit":
            self._node("source", above, backing="base")
            return lambda: run("block-commit", job_id="j", device="source", **auto)
        self._node("above", above, backing="base", read_only=True)
        self._node("source", active, backing="above")
        return lambda: run("block-commit", job_id="j", device="source", top_node="above", **auto)

    def copy(self) -> Sample:
        """Time the job alone."""
        start = self.prepare()
        before, began = self.daemon.cpu_seconds(), time.perf_counter()
        start()
        self.monitor.wait("BLOCK_JOB_READY" if self.row.kind in ("mirror", "active commit") else "BLOCK_JOB_COMPLETED")
        took = time.perf_counter() - began
        return Sample(self.size / took, 0, self.daemon.cpu_seconds() - before, self.daemon.memory("VmHWM"))

    def beside_a_guest(self, seconds: float) -> Sample:
        """Let the guest and jobs run for ``seconds``."""
        start = self.prepare()
        self.monitor.run("block-export-add", type="nbd", id="e", node_name="source", name="", writable=True)
        done: dict[str, Any] = {}

        def guest() -> None:
            try:
                load = {"rw": self.row.guest, "bs": "4k", "iodepth": 32, "size": self.size, "runtime": seconds + 0.6}
                done["job"] = fio({"uri": self.daemon.uri, "ramp_time": 0.3, **load}, "--time_based", "--norandommap")
            except LoadFailed as failed:
                done["failed"] = failed

        thread = threading.Thread(target=guest)
        thread.start()
        time.sleep(0.6)
        before, began, moved = self.daemon.cpu_seconds(), time.perf_counter(), 0
        start()
        while True:
            progress, over = self._progress()
            if (left := began + seconds - time.perf_counter()) <= 0:
                break
            if over:
                moved += progress
                self._end()
                start()
            else:
                time.sleep(min(0.02, left))
        took = time.perf_counter() - began
        cpu = self.daemon.cpu_seconds() - before
        thread.join()
        self._end()
        if "failed" in done:
            raise done["failed"]
        side = done["job"]["write" if self.row.guest == "randwrite" else "read"]
        return Sample((moved + progress) / took, float(side["iops"]), cpu, self.daemon.memory("VmHWM"))

    def _progress(self) -> tuple[int, bool]:
        """Bytes that the job has moved, and whether it has no more to do."""
        (job,) = self.monitor.run("query-block-jobs")
        return job["offset"], job["status"] in ("ready", "pending")

    def _end(self) -> None:
        """Cancel the job and wait for it: the graph is as before."""
        self.monitor.events.clear()
        self.monitor.run("block-job-cancel", device="j", force=True)
        self.monitor.wait("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED")
        while self.monitor.run("query-block-jobs"):
            time.sleep(0.005)


@dataclass
class JobsResult:
    """All samples of one call: row by row, daemon by daemon."""

    rows: list[Row]
    size: int
    runs: int
    seconds: float
    machine: str
    date: str
    samples: dict[tuple[Row, str], list[Sample]] = field(default_factory=dict)

    def median(self, row: Row, daemon: str, what: str) -> float | None:
        found = self.samples.get((row, daemon))
        return statistics.median(getattr(sample, what) for sample in found) if found else None

    def ratio(self, row: Row, what: str) -> float | None:
        own, other = self.median(row, "livedisk", what), self.median(row, "qemu-storage-daemon", what)
        return own / other if own and other else None

    def missed(self) -> list[str]:
        """Every aim that was measured and not reached, in words."""
        found = []
        for row in self.rows:
            aims = [("MB/s", "rate", row.wanted)] + (
                [("the guest's IOPS", "iops", row.wanted_guest)] if row.guest else []
            )
            for words, what, wanted in aims:
                ratio = self.ratio(row, what)
                if ratio is not None and ratio < wanted:
                    found.append(f"{row.title}, {words}: {ratio:.2f}, wanted {wanted:g}")
        return found

    def as_json(self) -> str:
        return json.dumps(
            {
                "date": self.date,
                "machine": self.machine,
                "runs": self.runs,
                "seconds": self.seconds,
                "allocated_bytes": self.size,
                "rows": {
                    row.name: {
                        daemon: [vars(sample) for sample in self.samples.get((row, daemon), [])]
                        for daemon in (kind.name for kind in DAEMONS)
                    }
                    | {"title": row.title, "ratio": self.ratio(row, "rate"), "ratio_guest": self.ratio(row, "iops")}
                    for row in self.rows
                },
                "missed": self.missed(),
            },
            indent=1,
        )


def measure_jobs(rows: list[Row], folder: Path, plan: Plan, tell: Tell) -> JobsResult:
    """Run everything in ``folder``; the plan's size is what is allocated. Raises ServerFailed or LoadFailed."""
    tell("making the disks", 0)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    disks = Disks(folder, plan.size // CLUSTER * CLUSTER)
    result = JobsResult(rows, disks.size, plan.runs, plan.seconds, machine(), date)
    turns = list(_turns(rows, plan.runs))
    for done, (row, daemon, number) in enumerate(turns):
        tell(f"{row.title}, {daemon.name}, run {number + 1}", done / len(turns))
        with ExitStack() as stack:
            there = stack.enter_context(daemon(())) if row.remote else None
            run = Run(row, stack.enter_context(daemon(())), disks, there)
            try:
                sample = run.beside_a_guest(plan.seconds) if row.guest else run.copy()
            finally:
                run.monitor.close()
        result.samples.setdefault((row, daemon.name), []).append(sample)
    return result


def _turns(rows: list[Row], runs: int) -> Iterator[tuple[Row, type[_Empty], int]]:
    for row in rows:
        for number in range(runs):
            for daemon in DAEMONS if number % 2 == 0 else DAEMONS[::-1]:
                yield row, daemon, number
