"""A real guest whose disk moves to another daemon while it writes: it sees nothing of it, and all its files are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import qemu
from kit.moving import Move
from kit.vm import VirtualMachine, e2fsck

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]

FILES = 40
WRITE_FILES = f"""\
n=0; while [ $n -lt {FILES} ]; do n=$((n + 1)); \
dd if=/dev/urandom of=/mnt/file$n bs=4k count=$((n * 37 % 100 + 1)) 2>/dev/null; \
md5sum /mnt/file$n >>/mnt/sums; sync; echo synced $n; done"""


def test_a_guest_writes_through_a_migration(short_path: Path, tmp_path: Path) -> None:
    with Move(short_path, size=256 << 20) as move:
        with VirtualMachine(short_path, move.proxy_socket("disk0"), export="disk0") as guest:
            guest.do("mkfs.ext4 -q -F /dev/vda && mount /dev/vda /mnt", timeout=120)
            writing = guest.begin(WRITE_FILES)
            writing.wait_for("synced 5\n", timeout=120)
            said = move.migrate().stdout
            assert "The guest is on the destination (running)" in said
            writing.wait(timeout=180)
            assert move.states() == ("postmigrate", "running")
            guest.do("umount /mnt && e2fsck -f -n /dev/vda", timeout=120)
            checked = guest.do("mount /dev/vda /mnt && md5sum -c /mnt/sums && umount /mnt", timeout=120)
            assert checked.count(": OK") == FILES
            guest.power_off()
        move.destination.stop()
        qemu.check(move.image("disk0"))
        qemu.qemu_img("convert", "-O", "raw", move.image("disk0"), tmp_path / "raw")
        e2fsck(tmp_path / "raw")
