"""Errors that do not go away, and failing requests of the guest itself, while a job runs: the guest and its data come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, qemu_io, read_all
from kit.raw_nbd import READ, WRITE, RawClient, request

MIB = 1 << 20


def image(path: Path, name: str, **more: Any) -> dict[str, Any]:
    """A qcow2 node on an injector of errors."""
    rules = {key: more.pop(key) for key in ("inject-error", "set-state") if key in more}
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, **rules}
    return {"driver": "qcow2", "node-name": name, "file": file, **more}


def ask(client: RawClient, what: bytes, length: int = 0) -> tuple[int, bytes]:
    """Error and data of a request."""
    client.send(what)
    _, error, _, data = client.reply(length)[0]
    return int(error), bytes(data)


JOBS = {
    "commit": ("block-commit", {"device": "top", "top-node": "mid", "base-node": "base"}),
    "active commit": ("block-commit", {"device": "top", "base-node": "base"}),
    "mirror": ("blockdev-mirror", {"device": "top", "target": "target", "sync": "full"}),
}


@pytest.mark.parametrize("name", JOBS)
def test_an_error_that_stays_is_met_again_and_again_until_a_cancel(name: str, short_path: Path, tmp_path: Path) -> None:
    create(short_path / "base", MIB)
    create(short_path / "mid", MIB, backing=short_path / "base")
    create(short_path / "top", MIB, backing=short_path / "mid")
    create(short_path / "target", MIB)
    qemu_io(short_path / "mid", "write -q -P 5 0 1M")
    rules = {"inject-error": [{"event": "write_aio", "iotype": "write"}]}
    command, arguments = JOBS[name]
    policy = "on-error" if command == "block-commit" else "on-target-error"
    failing = "base" if command == "block-commit" else "target"
    with Daemon(short_path) as daemon, daemon.qmp() as qmp:
        for node, below in (("base", None), ("mid", "base"), ("top", "mid"), ("target", None)):
            more = rules if node == failing else {}
            qmp.call("blockdev-add", image(short_path / node, node, backing=below, **more))
        qmp.execute("block-export-add", type="nbd", id="e", node_name="top", writable=True)
        with RawClient(str(daemon.nbd_socket)).enter(b"top") as guest:
            qmp.call(command, {"job-id": "j", **arguments, policy: "ignore"})
            for _ in range(3):
                data = qmp.wait_event("BLOCK_JOB_ERROR")
                assert (data["operation"], data["action"]) == ("write", "ignore")
            assert ask(guest, request(WRITE, 4096, 4, payload=b"here")) == (0, b"")
            qmp.execute("block-job-cancel", device="j", force=True)
            qmp.wait_event("BLOCK_JOB_CANCELLED")
            assert ask(guest, request(READ, 4094, 8), 8) == (0, b"\5\5here\5\5")
        daemon.stop(expect=1)  # what the failing image still had in memory cannot be written
    expected = bytearray(b"\5" * MIB)
    expected[4096:4100] = b"here"
    assert read_all(short_path / "top", tmp_path) == expected
    for node in ("base", "mid", "top"):
        check(short_path / node, leaks=True)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_guests_write_that_failed_in_part_is_mirrored_as_it_stands(
    mode: str, short_path: Path, tmp_path: Path
) -> None:
    create(short_path / "top", MIB)
    qemu_io(short_path / "top", "write -q -P 5 0 1M")
    create(short_path / "target", MIB)
    # The write of 256 KiB below is made in pieces of 64 KiB, of which the third fails.
    rule = {"event": "none", "iotype": "write", "sector": 10**6, "errno": 28}
    with Daemon(short_path) as daemon, daemon.qmp() as qmp:
        top = image(short_path / "top", "top", **{"inject-error": [rule]})
        top["file"] |= {"max-transfer": 65536, "align": 512}
        size = (short_path / "top").stat().st_size
        top["file"]["inject-error"] = [{**rule, "sector": (size - MIB // 2) // 512}]
        qmp.call("blockdev-add", top)
        qmp.call("blockdev-add", image(short_path / "target", "target"))
        qmp.execute("block-export-add", type="nbd", id="e", node_name="top", writable=True)
        with RawClient(str(daemon.nbd_socket)).enter(b"top") as guest:
            qmp.call(
                "blockdev-mirror",
                {"job-id": "j", "device": "top", "target": "target", "sync": "full", "copy-mode": mode},
            )
            qmp.wait_event("BLOCK_JOB_READY")
            error, _ = ask(guest, request(WRITE, MIB // 2 - 131072, 262144, payload=b"p" * 262144))
            assert error == 28
            _, before = ask(guest, request(READ, 0, MIB), MIB)
            assert 0 < before.count(b"p") < 262144
            qmp.execute("job-complete", id="j")
            assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")
            assert ask(guest, request(READ, 0, MIB), MIB) == (0, before)
        daemon.stop()
    assert read_all(short_path / "target", tmp_path) == before
