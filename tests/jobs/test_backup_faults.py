"""A backup whose target (or source) fails under a guest's write: who pays, the guest or the backup, and what is left."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import QemuNbd, qemu_io
from kit.qmp import Qmp

SIZE = 1 << 20
OLD, NEW = b"\x01", b"\x02"


class Disk:
    """A daemon with a disk ``s`` that is exported, and a target ``t``; a rule of blkdebug on either."""

    def __init__(self, folder: Path, daemon: Daemon, qmp: Qmp) -> None:
        self.folder, self.daemon, self.qmp = folder, daemon, qmp

    def guest(self, *commands: str, fails: bool = False) -> str:
        return qemu_io(self.daemon.uri("disk"), *commands, format="raw", expect=int(fails))

    def backup(self, **more: Any) -> None:
        self.qmp.execute("blockdev-backup", **{"job_id": "j", "device": "s", "target": "t", "sync": "none", **more})

    def ended(self, event: str = "BLOCK_JOB_COMPLETED") -> dict[str, Any]:
        data = self.qmp.wait_event(event)
        self.qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")
        nodes = {node["drv"] for node in self.qmp.execute("query-named-block-nodes", flat=True)}
        assert "copy-before-write" not in nodes
        return data

    def content(self, name: str) -> bytes:
        return (self.folder / f"{name}.raw").read_bytes()


@contextmanager
def disk(folder: Path, **rules: dict[str, Any]) -> Iterator[Disk]:
    options: list[str] = []
    for name, content in (("s", OLD), ("t", b"\xcc")):
        path = folder / f"{name}.raw"
        path.write_bytes(content * SIZE)
        file: dict[str, Any] = {"driver": "file", "filename": str(path)}
        rule = rules.get(name)
        if rule is not None:
            file = {"driver": "blkdebug", "node-name": f"{name}-debug", "image": file, **rule}
        options += ["--blockdev", json.dumps({"driver": "raw", "node-name": name, "file": file})]
    options += ["--export", "nbd,id=e,node-name=s,name=disk,writable=on"]
    with Daemon(folder, *options) as daemon, daemon.qmp() as qmp:
        yield Disk(folder, daemon, qmp)


def failing(iotype: str, number: int, **more: Any) -> dict[str, Any]:
    return {"inject-error": [{"event": "none", "iotype": iotype, "errno": number, **more}]}


@pytest.mark.parametrize(("side", "iotype"), [("t", "write"), ("s", "read")])
@pytest.mark.parametrize(("number", "text"), [(5, "Input/output error"), (28, "No space left on device")])
def test_by_default_the_backup_breaks_and_the_guest_goes_on(
    side: str, iotype: str, number: int, text: str, short_path: Path
) -> None:
    with disk(short_path, **{side: failing(iotype, number)}) as found:
        found.backup()
        found.guest("write -P 2 64k 64k", "flush")
        assert found.ended()["error"] == text
        assert any(event["event"] == "BLOCK_JOB_ERROR" for event in found.qmp.events)
        found.guest("write -P 2 0 64k", "write -P 2 128k 64k", "flush")
        found.daemon.stop(expect=0)
        assert found.content("s") == NEW * (192 << 10) + OLD * (SIZE - (192 << 10))


def test_a_backup_in_the_background_breaks_by_the_guest_too(short_path: Path) -> None:
    """One that is stopped by an error of its own must not hold the guest."""
    with disk(short_path, t=failing("write", 28)) as found:
        found.backup(sync="full", on_target_error="stop")
        found.qmp.wait_event("BLOCK_JOB_ERROR")
        found.guest("write -P 2 0 64k", "flush")
        found.qmp.execute("job-resume", id="j")
        assert found.ended()["error"] == "No space left on device"
        found.daemon.stop(expect=0)
        assert found.content("s")[: 64 << 10] == NEW * (64 << 10)


def test_break_guest_write_fails_the_guest_and_the_backup_goes_on(short_path: Path) -> None:
    with disk(short_path, t=failing("write", 5, once=True)) as found:
        found.backup(on_cbw_error="break-guest-write")
        assert "Input/output error" in found.guest("write -P 2 0 64k", fails=True)
        found.guest("read -P 1 0 64k", "write -P 2 0 64k", "flush")
        assert found.qmp.execute("query-block-jobs")[0]["status"] == "running"
        found.qmp.execute("block-job-cancel", device="j")
        found.ended("BLOCK_JOB_CANCELLED")
        found.daemon.stop(expect=0)
        assert found.content("s")[: 64 << 10] == NEW * (64 << 10)
        assert found.content("t")[: 128 << 10] == OLD * (64 << 10) + b"\xcc" * (64 << 10)


def test_a_target_that_hangs_costs_the_guest_the_timeout_and_no_data(short_path: Path) -> None:
    with disk(short_path, t={}) as found:
        found.qmp.human('qemu-io t-debug "break pwritev hung"')
        found.backup(cbw_timeout=1)
        found.guest("write -P 2 0 64k", "flush")
        found.guest("write -P 2 512k 64k", "flush")
        found.qmp.human('qemu-io t-debug "resume hung"')
        assert found.ended()["error"] == "Connection timed out"
        found.daemon.stop(expect=0)
        assert found.content("s")[: 64 << 10] == NEW * (64 << 10)


def test_a_failed_flush_of_the_target_fails_the_backup(short_path: Path) -> None:
    with disk(short_path, t=failing("flush", 5)) as found:
        found.backup(sync="full")
        assert found.ended()["error"] == "Input/output error"


@pytest.mark.parametrize("policy", ["ignore", "stop"])
def test_a_failed_flush_of_the_target_is_tried_again(policy: str, short_path: Path) -> None:
    with disk(short_path, t=failing("flush", 5, once=True)) as found:
        found.backup(sync="full", on_target_error=policy)
        found.qmp.wait_event("BLOCK_JOB_ERROR")
        if policy == "stop":
            found.qmp.execute("job-resume", id="j")
        assert "error" not in found.ended()
        found.daemon.stop(expect=0)
        assert found.content("t") == found.content("s")


def test_a_cancel_frees_the_guest_from_a_target_that_waits_to_reconnect(short_path: Path) -> None:
    """The target's server is gone, and is waited for longer than anybody has patience."""
    (short_path / "far.raw").write_bytes(bytes(SIZE))
    with disk(short_path) as found, QemuNbd(short_path, short_path / "far.raw") as server:
        far = {"type": "unix", "path": str(server.socket)}
        found.qmp.execute("blockdev-add", driver="nbd", node_name="far", server=far, reconnect_delay=1000)
        found.backup(target="far")
        found.guest("write -P 2 0 64k")
        server.kill()
        writing = threading.Thread(target=found.guest, args=("write -P 2 512k 64k", "flush"))
        writing.start()
        writing.join(1)
        assert writing.is_alive()  # it waits for its copy
        found.qmp.execute("job-cancel", id="j")
        writing.join(20)
        assert not writing.is_alive()
        found.ended("BLOCK_JOB_CANCELLED")
        found.daemon.stop(expect=0)  # what was written to the target may be lost: that is logged, and no failure
        assert found.content("s")[512 << 10 : 576 << 10] == NEW * (64 << 10)
