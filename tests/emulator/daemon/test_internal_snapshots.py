"""blockdev-snapshot-internal-sync and -delete-internal-sync, answered as QEMU answers them, alone and in transactions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, info, qemu_img, qemu_io
from kit.qmp import QmpError
from kit.side_by_side import MACHINE, Host, Step, compare, step


def make(device: str, name: str) -> Step:
    return step("blockdev-snapshot-internal-sync", device=device, name=name)


def delete(device: str, **which: str) -> Step:
    return step("blockdev-snapshot-delete-internal-sync", device=device, **which)


def together(*actions: tuple[str, dict[str, Any]]) -> Step:
    return step("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])


def _snapshot(device: str, name: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-snapshot-internal-sync", {"device": device, "name": name}


LOOK = Host(lambda folder: [one["name"] for one in info(folder / "a.qcow2", "-U").get("snapshots", [])])
SCRIPT: list[Step] = [
    make("zz", "s0"),
    make("a", ""),
    make("r", "s0"),
    make("ro", "s0"),
    make("one", "s0"),
    make("a", "s0"),
    make("a", "s0"),
    make("a", "s1"),
    make("a", "1"),
    make("over", "through raw"),
    make("base", "s0"),
    LOOK,
    step("query-named-block-nodes"),
    delete("zz", name="s0"),
    delete("a"),
    delete("a", name="", id=""),
    delete("a", name="none"),
    delete("a", id="9"),
    delete("a", id="9", name="s0"),
    delete("a", id="1", name="s1"),
    delete("a", id="1", name="s0"),
    delete("a", name="s1"),
    delete("a", id="3"),
    delete("r", id="3"),
    LOOK,
    together(_snapshot("a", "t0"), ("abort", {})),
    LOOK,
    together(_snapshot("a", "t0"), _snapshot("a", "t0")),
    together(_snapshot("a", "t0"), _snapshot("zz", "t0")),
    LOOK,
    together(_snapshot("a", "t0"), _snapshot("b", "t0"), _snapshot("a", "t1")),
    LOOK,
]
NODES = [
    *("-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=a.qcow2"),
    *("-blockdev", "qcow2,node-name=b,file.driver=file,file.filename=b.qcow2"),
    *("-blockdev", "qcow2,node-name=ro,read-only=on,file.driver=file,file.filename=ro.qcow2"),
    *("-blockdev", "qcow2,node-name=one,file.driver=file,file.filename=one.qcow2"),
    *("-blockdev", "raw,node-name=r,file.driver=file,file.filename=r.raw"),
    *("-blockdev", "raw,node-name=over,file.driver=qcow2,file.file.driver=file,file.file.filename=under.qcow2"),
    *("-blockdev", "qcow2,node-name=base,file.driver=file,file.filename=base.qcow2,read-only=on"),
    *("-blockdev", "qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base"),
]


def images(folder: Path) -> None:
    for name in ("a", "b", "ro", "under", "base", "top"):
        create(folder / f"{name}.qcow2", "4M")
    create(folder / "r.raw", "4M", format="raw")
    qemu_io(create(folder / "one.qcow2", "1M", options="refcount_bits=1"), "write 0 1M")


def test_answers_are_those_of_qemu(tmp_path: Path) -> None:
    compare(tmp_path, SCRIPT, prepare=images, options=[*MACHINE, *NODES], even_out=_without_length)
    for name in ("a", "b", "one", "under"):
        check(tmp_path / "ours" / f"{name}.qcow2")


def _without_length(text: str) -> str:
    # Where tables stand in the file, and so how long it is, is each one's own affair.
    return re.sub(r'"virtual-size": (?!4194304|1048576)\d+', '"virtual-size": 0', text)


def test_a_snapshot_taken_while_a_guest_writes_is_one_moment(short_path: Path) -> None:
    path = create(short_path / "a.qcow2", "64M")
    options = ["--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={path}"]
    with Daemon(short_path, *options, "--export", "nbd,id=e,node-name=a,writable=on") as daemon, daemon.qmp() as qmp:
        for number in range(1, 4):
            qemu_io(daemon.uri("a"), f"write -P {number} 0 64M", format="raw")
            qmp.execute("blockdev-snapshot-internal-sync", device="a", name=f"s{number}")
        qmp.execute("blockdev-snapshot-delete-internal-sync", device="a", name="s2")
        qemu_io(daemon.uri("a"), "read -P 3 0 64M", format="raw")
        with pytest.raises(QmpError, match="Snapshot with name 's1' already exists"):
            qmp.execute("blockdev-snapshot-internal-sync", device="a", name="s1")
    check(path)
    for number in (1, 3):
        qemu_img("snapshot", "-a", f"s{number}", path)
        qemu_io(path, f"read -P {number} 0 64M")
    check(path)


@pytest.mark.parametrize("snapshots", [0, 1])
def test_a_stream_warns_where_snapshots_lose_what_is_below_them(snapshots: int, short_path: Path) -> None:
    base = create(short_path / "base.qcow2", 1 << 20)
    over = create(short_path / "over.qcow2", 1 << 20, backing=base)
    for number in range(snapshots):
        qemu_img("snapshot", "-c", f"s{number}", over)
    options = ["--blockdev", f"qcow2,node-name=over,file.driver=file,file.filename={over}"]
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        qmp.execute("block-stream", device="over", job_id="j")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        daemon.stop(expect=0)
    warning = (
        "warning: node 'over' has internal snapshots: what they show of the images that it leaves is lost, as with QEMU"
    )
    assert daemon.output().count(warning) == snapshots
