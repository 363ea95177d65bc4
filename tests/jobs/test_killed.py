"""kill -9 at random moments of each job: the chain that the headers name still holds every byte that was there."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, info, qemu_io, read_all

SIZE = 16 << 20

JOBS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "stream": [("block-stream", {"device": "d"})],
    "stream to a base": [("block-stream", {"device": "d", "base-node": "a"})],
    "commit": [("block-commit", {"device": "d", "top-node": "c", "base-node": "a"})],
    "active commit": [("block-commit", {"device": "d"}), ("job-complete", {"id": "j"})],
    "mirror": [("blockdev-mirror", {"device": "d", "target": "t", "sync": "full"}), ("job-complete", {"id": "j"})],
    "backup": [("blockdev-backup", {"device": "d", "target": "t", "sync": "full"})],
    "backup of the top": [("blockdev-backup", {"device": "d", "target": "t", "sync": "top"})],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_loses_nothing(name: str, seed: int, short_path: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    options: list[str] = []
    for index, image in enumerate("abcd"):
        below = {"backing": short_path / f"{'abcd'[index - 1]}.qcow2"} if index else {}
        path = create(short_path / f"{image}.qcow2", SIZE, options="cluster_size=4096", **below)
        writes = [
            f"write -q -P {chance.randrange(1, 255)} {chance.randrange(SIZE >> 14) << 14} 16k" for _ in range(200)
        ]
        qemu_io(path, *writes)
        node = {"driver": "qcow2", "node-name": image, "file": {"driver": "file", "filename": str(path)}}
        node |= {"backing": "abcd"[index - 1]} if index else {}
        node |= {"read-only": True} if image != "d" else {}
        options += ["--blockdev", json.dumps(node)]
    file = {"driver": "file", "filename": str(create(short_path / "t.qcow2", SIZE))}
    options += ["--blockdev", json.dumps({"driver": "qcow2", "node-name": "t", "file": file})]
    before = read_all(short_path / "d.qcow2", tmp_path)
    with Daemon(short_path, *options, nbd=False) as daemon, daemon.qmp() as qmp:
        start, *after = JOBS[name]
        qmp.call(start[0], {"job-id": "j", **start[1]})
        if after and chance.random() < 0.7:
            qmp.wait_event("BLOCK_JOB_READY")
            qmp.send({"execute": after[0][0], "arguments": after[0][1]})
        time.sleep(chance.random() * 0.08)
        daemon.kill()
        with contextlib.suppress(OSError, EOFError):
            qmp.receive()
    chain = [Path(entry["filename"]).stem for entry in info(short_path / "d.qcow2", "--backing-chain")]
    assert "".join(chain) in ("dcba", "d", "da")
    for image in "abcdt":
        check(short_path / f"{image}.qcow2", leaks=True)
    assert read_all(short_path / "d.qcow2", tmp_path) == before
