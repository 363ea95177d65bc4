"""The fault matrix: each job, a failing request at each of its steps, each error policy; what is told, and what becomes of it.

One *cell* starts a daemon (ours or qemu-storage-daemon), injects one error by blkdebug, runs the job to its end as a user
would (resume what stopped, complete what is ready), lets a guest write and read when the error was told and at the end, and
notes what it saw. ``python -m kit.fault_matrix`` prints the table that stands in docs/faults.md.
"""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, check, create, qemu_io, read_all
from kit.qmp import Qmp, QmpError
from kit.raw_nbd import FLUSH, READ, WRITE, RawClient, request

MIB = 1 << 20
POLICIES = ("report", "ignore", "stop", "enospc", "auto")
_LATE = {"event": "flush_to_disk", "state": 1, "new_state": 2}
"""The first flush of a target comes when the job is ready."""
_WRITTEN = {"event": "write_aio", "state": 1, "new_state": 2}
"""And so does the guest's first write to the source, if the fault is to come then."""


@dataclass(frozen=True)
class Fault:
    """One failing request: which ``job``, which of its nodes (``side``), what fails (``what``), at which ``step``.

    ``event``: blkdebug's, at which the error is armed; ``late``: only when the job is ready; ``turn``: the first
    time that it happens, the second, ...; ``qcow2``: base and target are qcow2 images, not raw ones.
    """

    job: str
    side: str
    what: str
    step: str
    event: str
    number: int = errno.EIO
    turn: int = 1
    late: bool = False
    qcow2: bool = False

    @property
    def title(self) -> str:
        name = "ENOSPC" if self.number == errno.ENOSPC else "EIO"
        return f"{self.job}: {self.what} on the {self.side}, {self.step}, {name}"

    def rules(self, image: str) -> dict[str, Any]:
        """Options of the blkdebug node below ``image``."""
        if image != IMAGES[self.job][self.side]:
            return {}
        rule = {"event": self.event, "iotype": self.what, "errno": self.number, "once": True}
        first = 2 if self.late else 1
        last = first + self.turn - 1
        steps = [{"event": self.event, "state": state, "new_state": state + 1} for state in range(first, last)]
        late = _WRITTEN if self.side == "source" else _LATE
        states = [*([late] if self.late else []), *steps]
        return {"inject-error": [{**rule, "state": last}], **({"set-state": states} if states else {})}


IMAGES = {
    "stream": {"source": "base", "target": "top"},
    "commit": {"source": "mid", "base": "base", "overlay": "top"},
    "active commit": {"source": "top", "base": "base"},
    "mirror": {"source": "top", "target": "target"},
    "mirror, write-blocking": {"source": "top", "target": "target"},
    "backup": {"source": "top", "target": "target"},
    "backup, sync none": {"source": "top", "target": "target"},
}
"""Which image a side of a job is; base <- mid <- top is the guest's chain."""
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("block-stream", {"device": "top"}),
    "commit": ("block-commit", {"device": "top", "top-node": "mid", "base-node": "base"}),
    "active commit": ("block-commit", {"device": "top", "base-node": "base"}),
    "mirror": ("blockdev-mirror", {"device": "top", "target": "target", "sync": "full"}),
    "mirror, write-blocking": (
        "blockdev-mirror", {"device": "top", "target": "target", "sync": "full", "copy-mode": "write-blocking"}),
    "backup": ("blockdev-backup", {"device": "top", "target": "target", "sync": "full"}),
    "backup, sync none": ("blockdev-backup", {"device": "top", "target": "target", "sync": "none"}),
}  # fmt: skip


def _faults() -> Iterator[Fault]:
    space = errno.ENOSPC
    yield Fault("stream", "source", "read", "while it copies", "read_aio")
    yield Fault("stream", "target", "write", "while it copies", "write_aio")
    yield Fault("stream", "target", "write", "while it copies", "write_aio", space)
    yield Fault("stream", "target", "flush", "at the end", "flush_to_disk")
    yield Fault("stream", "target", "write", "when its header is changed", "pwritev", late=True)
    yield Fault("stream", "target", "write", "when its header is changed", "pwritev", space, late=True)
    yield Fault("commit", "source", "read", "while it copies", "read_aio")
    yield Fault("commit", "base", "write", "while it copies", "write_aio")
    yield Fault("commit", "base", "write", "while it copies", "write_aio", space)
    yield Fault("commit", "base", "flush", "at the end", "flush_to_disk")
    yield Fault("commit", "overlay", "write", "when its header is changed", "pwritev")
    yield Fault("commit", "overlay", "write", "when its header is changed", "pwritev", space)
    for job in ("active commit", "mirror", "mirror, write-blocking"):
        side = "base" if job == "active commit" else "target"
        yield Fault(job, "source", "read", "while it copies", "read_aio")
        for number in (errno.EIO, space):
            yield Fault(job, side, "write", "while it copies", "write_aio", number)
        for number in (errno.EIO, space):
            yield Fault(job, side, "flush", "before it is ready", "flush_to_disk", number)
        for number in (errno.EIO, space):
            yield Fault(job, side, "write", "when it is ready", "write_aio", number, late=True)
        if job != "mirror, write-blocking":  # that reads no more from its source
            yield Fault(job, "source", "read", "when it is ready", "read_aio", late=True)
        yield Fault(job, side, "flush", "when it completes", "flush_to_disk", late=True)
    yield Fault("backup", "source", "read", "while it copies", "read_aio")
    for number in (errno.EIO, space):
        yield Fault("backup", "target", "write", "while it copies", "write_aio", number)
    for number in (errno.EIO, space):
        yield Fault("backup", "target", "flush", "at the end", "flush_to_disk", number)
    for number in (errno.EIO, space):
        yield Fault("backup, sync none", "target", "write", "before a guest's write", "write_aio", number)
    yield Fault("backup, sync none", "source", "read", "before a guest's write", "read_aio")


FAULTS = list(_faults())

METADATA = (
    ("l2_load", "read"), ("l2_update", "write"), ("l1_update", "write"), ("refblock_load", "read"),
    ("refblock_update_part", "write"), ("refblock_alloc_write_blocks", "write"), ("refblock_alloc_hookup", "write"),
    ("cluster_free", "write"), ("cow_read", "read"), ("cow_write", "write"), ("flush_to_os", "write"),
    ("flush_to_disk", "flush"), ("pwritev_zero", "write"),
)  # fmt: skip
"""Events of a qcow2 image, and what fails then."""


def _further() -> Iterator[Fault]:
    for job, images in IMAGES.items():
        step = "before a guest's write" if job == "backup, sync none" else "while it copies"
        for side in images:
            events = [("read_aio", "read")] if side == "source" else [("write_aio", "write"), *METADATA]
            for event, what in events:
                for number in (errno.EIO, errno.ENOSPC) if what == "write" else (errno.EIO,):
                    for turn in (1, 2, 3):
                        yield Fault(job, side, what, step, event, number, turn, qcow2=True)
                    if event in ("read_aio", "write_aio"):
                        yield Fault(job, side, what, step, event, number, 2)


FURTHER = list(_further())
"""Later ones than the first, and those of metadata. Which request fails is the format's business, so that there is no row of
the table for it: what is held is that nothing is lost, and that a second attempt succeeds."""


@dataclass
class Seen:
    """What a cell came to. ``errors``: operation and action of each BLOCK_JOB_ERROR; ``held``: status and io-status in which the
    job stood still; ``end``: the last event, its error; ``reason``: query-jobs' error of the concluded job; ``again``: what a
    second attempt came to, if the first failed."""

    errors: list[tuple[str, str]] = field(default_factory=list)
    held: list[tuple[str, str]] = field(default_factory=list)
    ready: bool = False
    end: str = ""
    reason: str = ""
    guest: str = "goes on"
    data: str = ""
    again: Seen | None = None

    def lost(self, fault: Fault) -> str:
        """What was lost, or did not work; "" if nothing. An error of an image that the guest itself writes to may be met by the
        guest."""
        excused = fault.side in ("target", "base", "overlay") and self.guest.startswith("gets error")
        return "" if self.data == "whole" and (self.guest == "goes on" or excused) else f"{self.guest}, {self.data}"

    def cell(self) -> str:
        """In a few words."""
        told = ", ".join(f"{operation} {action}" for operation, action in self.errors) or "nothing told"
        held = "".join(f"; {status} ({io_status}), resumed" for status, io_status in self.held)
        return f"{told}{held}; {self.end}{f' ({self.reason})' if self.reason else ''}"


class Cell:
    """One fault under one policy on one daemon."""

    def __init__(self, kind: type[StorageDaemon], fault: Fault, policy: str, folder: Path) -> None:
        self.fault, self.policy, self.folder = fault, policy, folder
        self.model = bytearray(b"b" * MIB)
        self.model_at_start = self._at_start()
        self.seen = Seen()
        self._failed = False
        self._kind = kind
        self._guest: RawClient

    # -- setting up --------------------------------------------------------------------------------------------------
    def _make_images(self) -> None:
        for image in _template(qcow2=self.fault.qcow2).iterdir():
            shutil.copy(image, self.folder / image.name)
        self.model[: 256 << 10] = b"m" * (128 << 10) + b"t" * (128 << 10)

    def _options(self) -> list[str]:
        nodes = []
        for name in ("base", "mid", "top", "target"):
            node: dict[str, Any] = {"node-name": name, "driver": self._format(name)}
            file = {"driver": "file", "filename": str(self.folder / name)}
            node["file"] = {"driver": "blkdebug", "image": file, **self.fault.rules(name)}
            if name in ("mid", "top"):
                node["backing"] = "base" if name == "mid" else "mid"
            if name in ("base", "mid"):
                node |= {"read-only": True}
                node["file"] |= {"read-only": False} if name == "base" else {}
                node["file"]["image"] = {**file, "read-only": False} if name == "base" else file
            nodes += ["--blockdev", json.dumps(node)]
        return [*nodes, "--export", "nbd,id=e,node-name=top,name=d,writable=on"]

    def _format(self, name: str) -> str:
        return "raw" if name in ("base", "target") and not self.fault.qcow2 else "qcow2"

    # -- the guest ---------------------------------------------------------------------------------------------------
    def _guest_acts(self, letter: bytes, offset: int) -> None:
        """Write, read back, read what came from below."""
        self._guest_writes(letter, offset)
        for where in (offset, 0, 900 << 10):
            found = self._ask(request(READ, where, 4096), 4096)
            if found != self.model[where : where + 4096] and self.seen.guest == "goes on":
                self.seen.guest = "reads something else"

    def _guest_writes(self, letter: bytes, offset: int) -> None:
        data = letter * 4096
        if not self._write(offset, data):
            assert self._write(offset, data), "the error comes back"
        self.model[offset : offset + 4096] = data

    def _write(self, offset: int, data: bytes) -> bool:
        self._guest.send(request(WRITE, offset, len(data), payload=data))
        _, error, _, _ = self._guest.reply(0)[0]
        if error and self.seen.guest == "goes on":
            self.seen.guest = f"gets error {os.strerror(error)}"
        return not error

    def _ask(self, what: bytes, length: int = 0) -> bytes:
        self._guest.send(what)
        _, error, _, data = self._guest.reply(length)[0]
        if error and self.seen.guest == "goes on":
            self.seen.guest = f"gets error {os.strerror(error)}"
        return bytes(data)

    # -- the job -----------------------------------------------------------------------------------------------------
    def run(self) -> Seen:
        """Do it all; what was seen."""
        self._make_images()
        daemon = self._kind(self.folder, *self._options())
        with daemon, daemon.qmp() as qmp, RawClient(str(daemon.nbd_socket), timeout=20) as self._guest:
            self._guest.enter(b"d")
            self._start(qmp)
            if self.fault.step == "before a guest's write":
                self._guest_acts(b"W", 128 << 10)
                # It goes on until it is told to end, or has failed.
                self._try(qmp, "block-job-cancel", device="j")
            self._follow(qmp)
            self._guest_acts(b"Z", 700 << 10)
            self._ask(request(FLUSH))
            if self.seen.reason:
                self._try_again(qmp)
            daemon.stop(expect=None)
        self._look_at_images()
        return self.seen

    def _start(self, qmp: Qmp) -> None:
        name, arguments = COMMANDS[self.fault.job]
        if name in ("blockdev-mirror", "blockdev-backup"):
            policies = {"on-source-error": self.policy, "on-target-error": self.policy}
        else:
            policies = {"on-error": self.policy}
        qmp.call(name, {"job-id": "j", "auto-dismiss": False, **arguments, **policies})

    def _try_again(self, qmp: Qmp) -> None:
        """The failure is over and nothing of it is left that would keep a new job from its end."""
        qmp.events.clear()
        first, self.seen, self._failed = self.seen, Seen(), True
        self.model_at_start = bytes(self.model)
        self._start(qmp)
        if self.fault.job == "backup, sync none":
            self._guest_acts(b"N", 200 << 10)
            self._try(qmp, "block-job-cancel", device="j")
        self._follow(qmp)
        self._guest_acts(b"Y", 40 << 10)
        again, self.seen = self.seen, first
        self.seen.again = again

    def _follow(self, qmp: Qmp) -> None:
        completing = False
        while True:
            event = qmp.events.popleft() if qmp.events else qmp.receive()
            name, data = event["event"], event["data"]
            if name == "BLOCK_JOB_ERROR":
                self.seen.errors.append((data["operation"], data["action"]))
            elif name == "BLOCK_JOB_READY":
                self.seen.ready = True
                if self.fault.step == "when it is ready" and not self._failed:
                    # Through the filter and not in what is copied already: it gets dirty, or is mirrored at once.
                    if self.fault.side == "source":
                        self._guest_writes(b"R", 600 << 10)  # the read that fails is to be the job's
                    else:
                        self._guest_acts(b"R", 600 << 10)
                    self._wait_for_error(qmp)
                completing = True
                if not self.seen.errors or self.seen.errors[-1][1] != "stop" or self.seen.held:
                    self._complete(qmp)
            elif name == "JOB_STATUS_CHANGE" and data["status"] in ("paused", "standby"):
                if self._resume(qmp) and completing:
                    self._complete(qmp)
            elif name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                self.seen.end = name.removeprefix("BLOCK_JOB_").lower()
                self.seen.reason = data.get("error", "")
            elif name == "JOB_STATUS_CHANGE" and data["status"] == "concluded":
                qmp.execute("job-dismiss", id="j")
                return

    def _wait_for_error(self, qmp: Qmp) -> None:
        deadline = time.monotonic() + 20
        while not any(event["event"] == "BLOCK_JOB_ERROR" for event in qmp.events):
            assert time.monotonic() < deadline, "no error"
            time.sleep(0.005)
            qmp.execute("query-version")

    def _complete(self, qmp: Qmp) -> None:
        self._try(qmp, "job-complete", id="j")

    def _try(self, qmp: Qmp, command: str, **arguments: str) -> None:
        try:
            qmp.execute(command, **arguments)
        except QmpError:
            pass  # the job failed meanwhile

    def _resume(self, qmp: Qmp) -> bool:
        """If an error holds the job: note how, let the guest act, let it go on."""
        found = qmp.execute("query-block-jobs")
        if not found or found[0]["io-status"] == "ok" or found[0]["status"] not in ("paused", "standby"):
            return False
        self.seen.held.append((found[0]["status"], found[0]["io-status"]))
        self._guest_acts(b"S", 500 << 10)
        qmp.execute("job-resume", id="j")
        return True

    # -- afterwards --------------------------------------------------------------------------------------------------
    def _look_at_images(self) -> None:
        """The guest's data is whole in the chain that the headers name, or (after a pivot) in the image it went to."""
        last = self.seen.again or self.seen
        job, failed = self.fault.job, bool(last.reason)
        for name in ("base", "mid", "top", "target"):
            if self._format(name) == "qcow2":
                check(self.folder / name, leaks=True)
        home = "top"
        if not failed and job == "active commit":
            home = "base"
        elif not failed and job.startswith("mirror"):
            home = "target"
        found = read_all(self.folder / home, self.folder, "-f", self._format(home))
        self.seen.data = "whole" if found == self.model else "LOST"
        if job == "backup" and not failed:
            copy = read_all(self.folder / "target", self.folder, "-f", self._format("target"))
            self.seen.data += "" if copy == self.model_at_start else ", NOT the moment it started"
        if self.seen.again is not None and (failed or self.seen.again.guest != "goes on"):
            self.seen.data += f", a second attempt failed: {last.reason or last.guest}"

    def _at_start(self) -> bytes:
        start = bytearray(b"b" * MIB)
        start[: 128 << 10] = b"m" * (128 << 10)
        start[128 << 10 : 256 << 10] = b"t" * (128 << 10)
        return bytes(start)


@functools.cache
def _template(*, qcow2: bool) -> Path:
    """A folder with fresh images, which name each other without a path. The refcount blocks of qcow2 ones are small."""
    folder = Path(tempfile.mkdtemp(prefix="ldf"))
    atexit.register(shutil.rmtree, folder)
    if qcow2:
        create(folder / "base", MIB, options="cluster_size=4k")
        create(folder / "target", MIB, options="cluster_size=4k")
        qemu_io(folder / "base", f"write -q -P {ord('b')} 0 1M")
    else:
        (folder / "base").write_bytes(b"b" * MIB)
        (folder / "target").write_bytes(bytes(MIB))
    for name, below, form in (("mid", "base", "qcow2" if qcow2 else "raw"), ("top", "mid", "qcow2")):
        create(folder / name, MIB, options=f"backing_file={below},backing_fmt={form}")
    qemu_io(folder / "mid", f"write -q -P {ord('m')} 0 128k")
    qemu_io(folder / "top", f"write -q -P {ord('t')} 128k 128k")
    return folder


def run_cell(kind: type[StorageDaemon], fault: Fault, policy: str) -> Seen:
    """One cell in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ldf", dir="/tmp") as folder:
        return Cell(kind, fault, policy, Path(folder)).run()


HEAD = "| fault | " + " | ".join(POLICIES) + " |\n|---|" + "---|" * len(POLICIES)


def row(fault: Fault, seen: Sequence[Seen]) -> str:
    """A row of the table, from what was seen under each policy."""
    return f"| {fault.title} | " + " | ".join(one.cell() for one in seen) + " |"


def main() -> int:
    """Print the table in Markdown; with ``--qemu`` the rows of qemu-storage-daemon where they differ. Exit code 1 if anything
    was lost."""
    lost = 0
    print(HEAD)
    for fault in FAULTS:
        seen = [run_cell(Daemon, fault, policy) for policy in POLICIES]
        print(row(fault, seen), flush=True)
        for policy, one in zip(POLICIES, seen, strict=True):
            if one.data != "whole" or one.guest != "goes on":
                lost += 1
                print(f"LOST: {fault.title}, {policy}: the guest {one.guest}, its data is {one.data}", flush=True)
        if "--qemu" in sys.argv:
            theirs = row(fault, [run_cell(StorageDaemon, fault, policy) for policy in POLICIES])
            if theirs != row(fault, seen):
                print(f"QEMU: {theirs}", flush=True)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
