"""A bitmap is carried along when a disk moves to another image: as QEMU documents it, with the same outcome as in QEMU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, create, qemu_io
from kit.qmp import Qmp

PLACES = ("write 0 64k", "write 1M 64k", "write 3M 4k", "write 7M 128k")


def moved(peer: type[StorageDaemon], folder: Path) -> Any:
    folder.mkdir()
    options: list[str] = []
    for name in ("source", "target"):
        file = {"driver": "file", "filename": str(create(folder / f"{name}.qcow2", "8M"))}
        options += ["--blockdev", json.dumps({"driver": "qcow2", "node-name": name, "file": file})]
    with peer(folder, *options) as daemon, daemon.qmp(timeout=20) as qmp:
        qmp.execute("block-export-add", type="nbd", id="e", node_name="source", name="e", writable=True)
        qemu_io(daemon.uri("e"), "write 5M 64k", format="raw")
        qmp.execute("block-dirty-bitmap-add", node="source", name="b", persistent=True)
        qemu_io(daemon.uri("e"), PLACES[0], format="raw")
        qmp.execute("blockdev-mirror", job_id="m", device="source", target="target", sync="full")
        qmp.wait_event("BLOCK_JOB_READY")
        qmp.execute("block-dirty-bitmap-add", node="target", name="b", persistent=True)
        qmp.execute("block-dirty-bitmap-merge", node="target", target="b", bitmaps=[{"node": "source", "name": "b"}])
        qemu_io(daemon.uri("e"), *PLACES[1:3], format="raw")
        settled(qmp)
        qmp.execute("job-complete", id="m")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        qemu_io(daemon.uri("e"), PLACES[3], format="raw")
        digest = qmp.call("x-debug-block-dirty-bitmap-sha256", {"node": "target", "name": "b"})
        nodes = qmp.execute("query-named-block-nodes", flat=True)
        return digest, [one.get("dirty-bitmaps") for one in nodes if one["node-name"] in ("source", "target")]


def settled(qmp: Qmp) -> None:
    """The mirror has copied what was written."""
    while True:
        [job] = qmp.execute("query-block-jobs")
        if job["offset"] == job["len"]:
            return
        time.sleep(0.01)


def test_a_bitmap_is_merged_into_the_mirrors_target(short_path: Path) -> None:
    ours, theirs = moved(Daemon, short_path / "l"), moved(StorageDaemon, short_path / "q")
    assert ours == theirs
    on_target = next(one for one in ours[1][0] if one["name"] == "b")
    assert on_target["count"] == (1 + 1 + 1 + 2) * 65536
