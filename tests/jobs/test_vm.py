"""A real guest writes files without pause while every job runs on its disk, and through every pivot; nothing is lost.

One boot for all: stream, commit, active commit with its pivot, mirror with its pivot, backup. After each the guest has gone on
writing; at the end its file system is clean, and every file has the checksum that was noted when it was written. The backup is
a disk that a crash at its moment might have left.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from kit import qemu
from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.vm import VirtualMachine, debugfs, e2fsck

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = 192 << 20

# In the background: a file, its checksum, all made durable, announced; old files go away, so that the disk does not fill.
WRITE_FILES = """\
(n=0; while [ ! -e /tmp/stop ]; do n=$((n + 1)); \
dd if=/dev/urandom of=/mnt/file$n bs=4k count=$((n * 37 % 100 + 1)) 2>/dev/null; \
(cd /mnt; md5sum file$n >/mnt/sums/$n); sync; echo synced $n; \
[ $n -gt 60 ] && rm -f /mnt/file$((n - 60)) /mnt/sums/$((n - 60)); done) &"""


class Disk:
    """The guest's disk: where it is, as the jobs move it. ``top`` is the node that the guest writes to."""

    def __init__(self, qmp: Qmp, folder: Path, guest: VirtualMachine) -> None:
        self._qmp = qmp
        self._folder = folder
        self._guest = guest
        self._number = 0
        self.top = "disk-0"

    def path(self, node: str) -> Path:
        return self._folder / f"{node}.qcow2"

    def written(self) -> int:
        """How many files the guest has announced."""
        found: list[str] = re.findall(r"synced (\d+)\n", self._guest.output())
        return int(found[-1]) if found else 0

    def let_guest_write(self, files: int = 3) -> None:
        """Wait until the guest has written that many files more."""
        wanted = self.written() + files
        self._guest.wait_until(lambda: self.written() >= wanted, f"file {wanted}", timeout=120)

    def snapshot(self) -> str:
        """Put an overlay on; returns the node below."""
        below = self.top
        self._number += 1
        self.top = f"disk-{self._number}"
        self._qmp.execute(
            "blockdev-snapshot-sync",
            node_name=below,
            snapshot_file=str(self.path(self.top)),
            snapshot_node_name=self.top,
            format="qcow2",
        )
        self.let_guest_write()
        return below

    def job(self, command: str, **arguments: str) -> None:
        """Run a job to its end, completing it when it is ready; the guest writes before and after."""
        self._qmp.execute(command, job_id="job0", **arguments)
        if command in ("block-stream", "blockdev-backup") or "top_node" in arguments:
            self._qmp.wait_event("BLOCK_JOB_COMPLETED", self._succeeded, timeout=120)
        else:
            self._qmp.wait_event("BLOCK_JOB_READY", timeout=120)
            self.let_guest_write()
            self._qmp.execute("job-complete", id="job0")
            self._qmp.wait_event("BLOCK_JOB_COMPLETED", self._succeeded, timeout=120)
        self._qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "null")
        self.let_guest_write()

    def target(self, node: str) -> None:
        """A new image, open as a node."""
        qemu.create(self.path(node), SIZE)
        file = {"driver": "file", "filename": str(self.path(node))}
        self._qmp.execute("blockdev-add", driver="qcow2", node_name=node, file=file)

    @staticmethod
    def _succeeded(data: dict[str, object]) -> bool:
        assert "error" not in data, data
        return True


def test_guest_writes_through_every_job_and_every_pivot(short_path: Path, tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "disk-0.qcow2", SIZE)
    options = [
        *("--blockdev", f"driver=qcow2,node-name=disk-0,discard=unmap,file.driver=file,file.filename={base}"),
        *("--device", "virtio-blk,drive=disk-0,id=virtio0"),
    ]
    with Daemon(short_path, *options) as daemon, daemon.qmp(timeout=120) as qmp:
        qmp.execute("nbd-server-add", device="virtio0", name="disk", writable=True)
        with VirtualMachine(short_path, daemon.nbd_socket, export="disk") as guest:
            guest.do("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt && mkdir /mnt/sums", timeout=120)
            guest.do(WRITE_FILES)
            disk = Disk(qmp, tmp_path, guest)
            disk.let_guest_write()

            for _ in range(4):
                disk.snapshot()  # 0 <- 1 <- 2 <- 3 <- 4
            disk.job("block-stream", device="disk-4", base_node="disk-2")  # 0 <- 1 <- 2 <- 4
            disk.job("block-commit", device="disk-4", top_node="disk-2", base_node="disk-1")  # 0 <- 1 <- 4
            disk.job("block-commit", device="disk-4", base_node="disk-1")  # 0 <- 1
            disk.target("mirrored")
            disk.job("blockdev-mirror", device="disk-1", target="mirrored", sync="full")
            disk.target("backup")
            synced = disk.written()
            disk.job("blockdev-backup", device="mirrored", target="backup", sync="full")

            # Waited for there: busybox's shell ends, and the guest with it, if a child does while it reads from the console.
            guest.do("touch /tmp/stop; wait", timeout=120)
            guest.do("umount /mnt && e2fsck -f -n /dev/vda", timeout=120)
            checked = guest.do(
                "mount /dev/vda /mnt && cd /mnt && cat sums/* | md5sum -c && cd / && umount /mnt", timeout=120
            )
            assert checked.count(": OK") >= min(60, synced)
            guest.power_off()
        daemon.stop()
    assert len(qemu.info(disk.path("mirrored"), "--backing-chain")) == 1
    for node in ("disk-0", "disk-1", "mirrored", "backup"):
        qemu.check(disk.path(node))
    assert_is_what_a_crash_leaves(disk.path("backup"), synced, tmp_path)


def assert_is_what_a_crash_leaves(image: Path, synced: int, scratch: Path) -> None:
    """Its journal replays, and the last files that the guest had announced are in it, byte for byte."""
    raw = scratch / "moment.raw"
    qemu.qemu_img("convert", "-O", "raw", image, raw)
    e2fsck(raw)
    for number in range(max(1, synced - 20), synced + 1):
        told = debugfs(raw, f"cat /sums/{number}").split()[0]
        content = scratch / "content"
        debugfs(raw, f"dump /file{number} {content}")
        assert hashlib.md5(content.read_bytes()).hexdigest() == told, f"file{number} of the backup"
