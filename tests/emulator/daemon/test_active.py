"""blockdev-set-active: images that another process may have, as QEMU gives them up and takes them back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.peers import run
from kit.places import short_folder
from kit.qemu import create, qemu_io
from kit.qmp import Qmp, QmpError
from kit.side_by_side import MACHINE, Host, Human, Step, compare, step


def add(name: str, image: str | None = None, **options: Any) -> Step:
    file = {"driver": "file", "filename": f"{image or name}.qcow2", "node-name": f"{name}-file"}
    return step("blockdev-add", driver="qcow2", node_name=name, file=file, **options)


def active(node: str, on: bool) -> Step:
    return step("blockdev-set-active", node_name=node, active=on)


def writable(image: str) -> Host:
    """Whether another process may write the image."""
    return Host(lambda folder: "lock" not in run(["qemu-io", "-c", "sleep 0", folder / image], expect=None).stderr)


def client(*commands: str) -> Host:
    """What a client of the export b says to these."""

    def act(folder: Path) -> list[str]:
        arguments = [part for one in commands for part in ("-c", one)]
        uri = f"nbd+unix:///b?socket={folder / 'nbd'}"
        done = run(["qemu-io", "-f", "raw", *arguments, uri], expect=None)
        return [line for line in (done.stdout + done.stderr).splitlines() if "ops" not in line]

    return Host(act)


NODES = step("query-named-block-nodes", flat=True)
CHANGES = ("read 0 512", "write 0 512", "discard 0 64k", "write -z 0 512", "flush")
NBD = step("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd"}})
SCRIPTS: dict[str, list[Step]] = {
    "up and down a chain": [
        step("blockdev-set-active", active=False),
        active("zz", False),
        add("a"),
        writable("a.qcow2"),
        active("a", False),
        writable("a.qcow2"),
        active("a", False),
        NODES,
        active("a-file", True),
        active("a", True),
        writable("a.qcow2"),
        active("a-file", False),
        NODES,
    ],
    "opened inactive": [
        add("b", active=False),
        writable("b.qcow2"),
        step("blockdev-add", driver="raw", node_name="above", file="b"),
        step("blockdev-add", driver="raw", node_name="above", file="b", active=False),
        add("a", active=False, backing={"driver": "null-co", "node-name": "below"}),
        NODES,
        step("blockdev-add", driver="null-co", node_name="t", size=1 << 20),
        step("blockdev-mirror", job_id="j", device="t", target="b", sync="full"),
        step("block_resize", node_name="b", size=2 << 20),
        step("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "b", "file": "b-file"}]),
        active("b", True),
        NODES,
        step("block_resize", node_name="b", size=8 << 20),
        writable("b.qcow2"),
    ],
    "a disk and its snapshot": [
        active("disk", False),
        Human("info block -n disk"),
        step("query-block"),
        step("blockdev-snapshot-sync", node_name="disk", snapshot_file="s.qcow2", snapshot_node_name="s"),
        NODES,
        step("cont"),
        NODES,
        step("stop"),
        step("blockdev-set-active", active=False),
        NODES,
        step("blockdev-set-active", active=True),
        NODES,
    ],
    "exports": [
        NBD,
        add("b", active=False),
        step("block-export-add", type="nbd", id="e", node_name="b", writable=True, allow_inactive=True),
        client(*CHANGES),
        active("b", True),
        client(*CHANGES),
        active("b", False),
        client(*CHANGES),
        writable("b.qcow2"),
        step("block-export-del", id="e"),
        step("block-export-add", type="nbd", id="e", node_name="b", writable=True),
        active("b", False),
        NODES,
        step("block-export-del", id="e"),
        active("b", False),
        step("nbd-server-add", device="b", writable=True),
        NODES,
    ],
}


def prepare(folder: Path) -> None:
    for name in ("a", "b", "disk"):
        create(folder / f"{name}.qcow2", "1M")


def even_out(text: str) -> str:
    """How large a file becomes depends on where an image puts its tables."""
    return re.sub(r'"virtual-size": (?!1048576)\d+', '"virtual-size": 0', text)


AWAITING: list[Step] = [
    NODES,
    writable("disk.qcow2"),
    add("b", active=True),
    writable("b.qcow2"),
    step("blockdev-add", driver="raw", node_name="above", file="b"),
    step("blockdev-add", driver="null-co", node_name="t", size=1 << 20),
    NODES,
    step("block_resize", node_name="disk", size=2 << 20),
    step("blockdev-mirror", job_id="j", device="disk", target="t", sync="full"),
    step("block-stream", job_id="j", device="disk"),
    step("blockdev-backup", job_id="j", device="disk", target="t", sync="full"),
    Human("drive_add 0 if=none,id=d,file=a.qcow2,format=qcow2"),
    step("drive-mirror", device="d", target="m.raw", format="raw", sync="full"),
    step("blockdev-snapshot-sync", node_name="disk", snapshot_file="s.qcow2", snapshot_node_name="s"),
    NODES,
    NBD,
    step("nbd-server-add", device="d", writable=True),
    NODES,
    step("block-export-add", type="nbd", id="e", node_name="b", allow_inactive=True),
    client("read 0 512", "write 0 512"),
    step("blockdev-set-active", node_name="s", active=True),
    NODES,
    step("cont"),
    step("query-status"),
]
"""While a guest is to come from another process: every node is opened inactive, until it is exported."""

DISK = ["-blockdev", "qcow2,node-name=disk,file.driver=file,file.node-name=disk-file,file.filename=disk.qcow2"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_qemu(name: str, short_path: Path) -> None:
    options = [*MACHINE, *DISK, "-device", "virtio-blk-pci,drive=disk,id=v", *([] if "-S" in MACHINE else ["-S"])]
    compare(short_path, SCRIPTS[name], prepare=prepare, options=options, even_out=even_out)


def test_awaiting_a_guest_as_qemu(short_path: Path) -> None:
    options = [*MACHINE, *DISK, "-device", "virtio-blk-pci,drive=disk,id=v", "-incoming", "defer"]
    compare(short_path, AWAITING, prepare=prepare, options=options, even_out=even_out)


# -- what QEMU does not do ---------------------------------------------------------------------------------------------
def test_the_disk_of_a_guest_that_runs_stays(short_path: Path) -> None:
    """QEMU 10.0 takes it away, and aborts at the guest's next write."""
    create(short_path / "disk.qcow2", "1M")
    device = ["-device", "virtio-blk,drive=disk,id=v"]
    with Daemon(short_path, *DISK, *device, cwd=short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        with pytest.raises(QmpError, match="Failed to inactivate node: Operation not permitted"):
            qmp.execute("blockdev-set-active", node_name="disk", active=False)
        qmp.execute("stop")
        qmp.execute("blockdev-set-active", node_name="disk", active=False)


def test_two_processes_hand_an_image_to_and_fro(short_path: Path) -> None:
    create(short_path / "disk.qcow2", "1M")
    with (
        short_folder() as other,
        Daemon(short_path, *DISK, cwd=short_path) as one,
        Daemon(other, f"{DISK[0]}", f"{DISK[1]},active=off", cwd=short_path) as two,
        Qmp(one.qmp_socket) as first,
        Qmp(two.qmp_socket) as second,
    ):
        for round, (taker, giver, there) in enumerate([(first, second, one), (second, first, two)] * 2):
            with pytest.raises(QmpError, match='Failed to get "write" lock') if round else _nothing():
                taker.execute("blockdev-set-active", node_name="disk", active=True)
            giver.execute("blockdev-set-active", node_name="disk", active=False)
            taker.execute("blockdev-set-active", node_name="disk", active=True)
            taker.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
            if round:
                qemu_io(there.uri("disk"), f"read -P {round} {round - 1}k 1k", format="raw")
            qemu_io(there.uri("disk"), f"write -P {round + 1} {round}k 1k", format="raw")
            taker.execute("block-export-del", id="e")
    run(["qemu-img", "check", short_path / "disk.qcow2"])


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_an_image_that_somebody_has_is_not_activated_and_the_guest_does_not_run(short_path: Path) -> None:
    create(short_path / "disk.qcow2", "1M")
    with short_folder() as other, Daemon(short_path, *DISK, cwd=short_path):
        device = ["-S", "-device", "virtio-blk,drive=d,id=v", "-blockdev", "null-co,node-name=d"]
        with (
            Daemon(other, DISK[0], f"{DISK[1]},active=off", *device, cwd=short_path) as two,
            Qmp(two.qmp_socket) as qmp,
        ):
            with pytest.raises(QmpError, match='Failed to get "write" lock'):
                qmp.execute("cont")
            assert qmp.execute("query-status")["running"] is False
            nodes = {node["node-name"]: node["active"] for node in qmp.execute("query-named-block-nodes", flat=True)}
            assert nodes == {"disk": False, "disk-file": True, "d": True}


def test_reopen_leaves_active_alone(short_path: Path) -> None:
    create(short_path / "disk.qcow2", "1M")
    with Daemon(short_path, DISK[0], f"{DISK[1]},active=off", cwd=short_path) as daemon, Qmp(daemon.qmp_socket) as qmp:
        same = {"driver": "qcow2", "node-name": "disk", "file": "disk-file"}
        qmp.execute("blockdev-reopen", options=[{**same, "active": False}])
        with pytest.raises(QmpError, match="Cannot change the option 'active'"):
            qmp.execute("blockdev-reopen", options=[{**same, "active": True}])
