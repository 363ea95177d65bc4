"""A mirror whose target gets its backing file only at the end: nothing may hide what that will show.

qemu-storage-daemon 10.0.2 loses it in the write-blocking mode: its target fills the rest of a cluster that a guest wrote a part
of with zeroes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.qemu import create, qemu_io, read_all

MIB = 1 << 20


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("sync", ["top", "none"])
def test_a_write_to_a_part_of_a_cluster_hides_nothing(sync: str, mode: str, short_path: Path, tmp_path: Path) -> None:
    create(short_path / "base", 4 * MIB)
    qemu_io(short_path / "base", "write -q -P 5 0 4M")
    create(short_path / "top", 4 * MIB, options="cluster_size=4096", backing=short_path / "base")
    qemu_io(short_path / "top", "write -q -P 6 1M 4k")  # a part of a cluster of the target
    node = f"driver=qcow2,node-name=n,file.driver=file,file.filename={short_path}/top"
    expected = bytearray(b"\5" * 4 * MIB)
    expected[MIB : MIB + 4096] = b"\6" * 4096
    with Daemon(short_path, "--blockdev", node, "--export", "nbd,id=e,node-name=n,name=d,writable=on") as daemon:
        with daemon.qmp() as qmp:
            target = {"target": str(short_path / "t"), "node-name": "t", "format": "qcow2", "mode": "absolute-paths"}
            options = {"device": "n", "sync": sync, "copy-mode": mode, "granularity": 4096, **target}
            qmp.call("drive-mirror", {"job-id": "j", **options})
            qmp.wait_event("BLOCK_JOB_READY")
            script(daemon.uri("d"), "h.pwrite(b'w' * 512, 2000384); h.zero(512, 3000320); h.trim(512, 3500032)")
            expected[2000384:2000896] = b"w" * 512
            expected[3000320:3000832] = bytes(512)
            qmp.execute("job-complete", id="j")
            assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")
            qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")
            nodes = {node["node-name"]: node["ro"] for node in qmp.execute("query-named-block-nodes", flat=True)}
            assert not nodes["t"]
            assert nodes["n"] is (sync == "none")  # an image below; QEMU leaves it writable
        daemon.stop()
    assert read_all(short_path / "t", tmp_path) == expected
