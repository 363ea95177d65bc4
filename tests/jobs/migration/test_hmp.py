"""Migration by the human monitor, as QEMU answers."""

from __future__ import annotations

import re
import time
from pathlib import Path

from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.side_by_side import NO_MACHINE, Host, Human, compare

LINES = [
    "info migrate",
    "migrate",
    "migrate zz:1",
    "migrate -r unix:none",
    "migrate_cancel",
    "migrate_continue device",
    "migrate_continue zz",
    "migrate_incoming unix:x",
    "migrate_set_capability events on",
    "migrate_set_capability zz on",
    "migrate_set_capability events zz",
    *(f"help {name}" for name in ("migrate", "migrate_cancel", "migrate_incoming", "migrate_continue")),
    *(f"help {name}" for name in ("migrate_set_capability", "info migrate")),
]


def even_out(text: str) -> str:
    return re.sub(r"globals:.*?clear-bitmap-shift: \d+(\\r\\n)", "", text)


def settle(folder: Path) -> None:
    """Let an attempt fail that there is nobody for."""
    time.sleep(0.3)


def test_as_qemu(short_path: Path) -> None:
    script = [
        *(Human(line) for line in LINES),
        Human("migrate -d unix:none"),
        Host(settle),
        Human("info migrate"),
        Human("migrate unix:none"),
        Host(settle),
        Human("info migrate"),
    ]
    compare(short_path, script, options=NO_MACHINE, even_out=even_out, events=False)


def test_a_guest_moves(short_path: Path) -> None:
    disk = ["-blockdev", "null-co,node-name=d,size=1048576", "-device", "virtio-blk,drive=d,id=v"]
    with (
        Daemon(short_path, *disk, name="src") as source,
        Daemon(short_path, *disk, "-incoming", "defer", name="dst") as destination,
        Qmp(source.qmp_socket) as from_,
        Qmp(destination.qmp_socket) as to,
    ):
        assert to.human(f"migrate_incoming unix:{short_path}/m") == ""
        assert from_.human(f"migrate -d unix:{short_path}/m") == ""
        to.wait_event("RESUME")
        source.wait_until(lambda: "completed" in from_.human("info migrate"), "the end", timeout=10)
        assert re.fullmatch(
            r"Migration status: completed\r\ntotal time: \d+ ms\r\ndowntime: \d+ ms\r\nsetup: \d+ ms\r\n",
            from_.human("info migrate"),
        )
        assert "(null-co, inactive)" in from_.human("info block -n d")
        from_.execute("cont")
        assert "inactive" not in from_.human("info block -n d")
        assert "pause-before-switchover: off\r\n" in from_.human("info migrate_capabilities")
