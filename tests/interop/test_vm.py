"""A real guest on our export: it makes a file system, writes while its disk is snapshotted, reboots and reads all
back.

And every snapshot is a disk that a crash at that moment might have left: its journal replays, and every file that
the guest had synced before the snapshot is in it, byte for byte.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit import qemu
from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.vm import Pending, VirtualMachine, debugfs, e2fsck

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

SIZE = 256 << 20
FILES = 40

# Each file is as large as it likes, then its checksum is noted, then both are made durable, then it is announced.
WRITE_FILES = f"""\
n=0; while [ $n -lt {FILES} ]; do n=$((n + 1)); \
dd if=/dev/urandom of=/mnt/file$n bs=4k count=$((n * 37 % 100 + 1)) 2>/dev/null; \
md5sum /mnt/file$n >>/mnt/sums; sync; echo synced $n; done"""


@dataclass
class Snapshot:
    """``image`` froze when the guest had announced ``synced`` files."""

    image: Path
    synced: int


def daemon_options(image: Path) -> list[str]:
    return [
        *("--blockdev", f"driver=qcow2,node-name=disk-0,discard=unmap,file.driver=file,file.filename={image}"),
        *("--device", "virtio-blk,drive=disk-0,id=virtio0"),
    ]


def snapshot(qmp: Qmp, writing: Pending, number: int, folder: Path) -> Snapshot:
    """Wait for the guest to be well under way, then put an overlay on its disk."""
    writing.wait_for(f"synced {number * FILES // 4}\n", timeout=120)
    synced = int(re.findall(r"synced (\d+)\n", writing.output())[-1])
    qmp.execute(
        "blockdev-snapshot-sync",
        node_name=f"disk-{number - 1}",
        snapshot_file=str(folder / f"disk-{number}.qcow2"),
        snapshot_node_name=f"disk-{number}",
        format="qcow2",
    )
    return Snapshot(folder / f"disk-{number - 1}.qcow2", synced)


def assert_is_what_a_crash_leaves(frozen: Snapshot, scratch: Path) -> None:
    disk = scratch / "frozen.raw"
    qemu.qemu_img("convert", "-O", "raw", frozen.image, disk)
    e2fsck(disk)
    sums = dict(reversed(line.split()) for line in debugfs(disk, "cat /sums").splitlines() if len(line.split()) == 2)
    for number in range(1, frozen.synced + 1):
        content = scratch / "content"
        debugfs(disk, f"dump /file{number} {content}")
        found = hashlib.md5(content.read_bytes()).hexdigest()
        assert found == sums[f"/mnt/file{number}"], f"file{number} of {frozen.image.name}"
    disk.unlink()


def test_guest_survives_snapshots_and_reboot(short_path: Path, tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "disk-0.qcow2", SIZE)
    frozen = []
    with Daemon(short_path, *daemon_options(base)) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="virtio0", name="disk", writable=True)
        with VirtualMachine(short_path, daemon.nbd_socket, export="disk") as guest:
            guest.do("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt", timeout=120)
            writing = guest.begin(WRITE_FILES)
            for number in (1, 2, 3):
                frozen.append(snapshot(qmp, writing, number, tmp_path))
            writing.wait(timeout=180)
            guest.do("umount /mnt")

            guest.reboot()
            guest.do("e2fsck -f -n /dev/vda", timeout=120)
            checked = guest.do("mount /dev/vda /mnt && md5sum -c /mnt/sums && umount /mnt", timeout=120)
            assert checked.count(": OK") == FILES
            guest.power_off()
        daemon.stop()

    assert len(qemu.info(tmp_path / "disk-3.qcow2", "--backing-chain")) == 4
    for number in range(4):
        qemu.check(tmp_path / f"disk-{number}.qcow2")
    for moment in frozen:
        assert_is_what_a_crash_leaves(moment, tmp_path)


def test_what_a_guest_synced_survives_killing_everything(short_path: Path, tmp_path: Path) -> None:
    disk = qemu.create(tmp_path / "disk-0.qcow2", SIZE)
    with Daemon(short_path, *daemon_options(disk)) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="virtio0", name="disk", writable=True)
        with VirtualMachine(short_path, daemon.nbd_socket, export="disk") as guest:
            guest.do("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt", timeout=120)
            writing = guest.begin(WRITE_FILES)
            writing.wait_for("synced 12\n", timeout=120)
            synced = int(re.findall(r"synced (\d+)\n", writing.output())[-1])
            daemon.kill()
            guest.kill()

    qemu.check(disk, leaks=True)
    assert_is_what_a_crash_leaves(Snapshot(disk, synced), tmp_path)


def test_trim_in_the_guest_gives_space_back(short_path: Path, tmp_path: Path) -> None:
    disk = qemu.create(tmp_path / "disk-0.qcow2", SIZE)
    with Daemon(short_path, *daemon_options(disk)) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="virtio0", name="disk", writable=True)
        with VirtualMachine(short_path, daemon.nbd_socket, export="disk") as guest:
            guest.do("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt", timeout=120)
            guest.do("dd if=/dev/urandom of=/mnt/large bs=1M count=32 && sync", timeout=120)
            before = sum(extent["length"] for extent in qemu.measure_map(disk, "-U") if extent["data"])
            guest.do("rm /mnt/large && sync && fstrim /mnt && umount /mnt", timeout=120)
            guest.power_off()
        daemon.stop()
    after = sum(extent["length"] for extent in qemu.measure_map(disk) if extent["data"])
    assert before - after > 30 << 20
    qemu.check(disk)
