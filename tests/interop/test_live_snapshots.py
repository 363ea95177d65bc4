"""The command line of QEMU's page "Live Block Device Operations", as it stands, and snapshots made while a client
writes."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit import qemu
from kit.livedisk import executable
from kit.process import Process
from kit.qmp import Qmp, QmpError
from kit.writer import Writer, now

SIZE = 64 << 20
NODES = "ABCD"

COMMAND_LINE = (
    "-display none -no-user-config -nodefaults -m 512 "
    "-blockdev node-name=node-A,driver=qcow2,file.driver=file,file.node-name=file,file.filename=./a.qcow2 "
    "-device virtio-blk,drive=node-A,id=virtio0 -monitor stdio -qmp unix:./qmp-sock,server=on,wait=off"
)


@contextmanager
def running(folder: Path) -> Iterator[tuple[Process, Qmp]]:
    """The page's command line in ``folder``, with an NBD server whose export ``disk`` is the guest's door to its
    disk."""
    arguments = [executable(), "daemon", *COMMAND_LINE.split()]
    with Process(arguments, log=folder / "daemon.log", cwd=folder, stdin=subprocess.PIPE) as daemon:
        daemon.wait_for_socket(folder / "qmp-sock")
        with Qmp(folder / "qmp-sock") as qmp:
            address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
            qmp.execute("nbd-server-start", addr=address)
            qmp.execute("nbd-server-add", device="virtio0", name="disk", writable=True)
            yield daemon, qmp


def uri(folder: Path) -> str:
    return f"nbd+unix:///disk?socket={folder / 'nbd'}"


def image(folder: Path, node: str) -> Path:
    return folder / f"{node.lower()}.qcow2"


def snapshot(qmp: Qmp, folder: Path, below: str, above: str) -> tuple[int, int]:
    """Put ``above`` on ``below``; returns the times before and after, between which the snapshot's moment lies."""
    before = now()
    qmp.execute(
        "blockdev-snapshot-sync",
        node_name=f"node-{below}",
        snapshot_file=str(image(folder, above)),
        snapshot_node_name=f"node-{above}",
        format="qcow2",
    )
    return before, now()


def assert_chain_is_sound(folder: Path) -> None:
    chain = qemu.info(image(folder, "D"), "--backing-chain")
    assert [Path(entry["filename"]).name for entry in chain] == ["d.qcow2", "c.qcow2", "b.qcow2", "a.qcow2"]
    assert [entry.get("backing-filename-format") for entry in chain] == ["qcow2", "qcow2", "qcow2", None]
    for node in NODES:
        qemu.check(image(folder, node))


def test_chain_made_under_write_load_is_made_of_moments(short_path: Path, tmp_path: Path) -> None:
    qemu.create(image(short_path, "A"), SIZE)
    moments = {}
    with running(short_path) as (daemon, qmp):
        with Writer(uri(short_path), SIZE, tmp_path, depth=16) as writer:
            for below, above in itertools.pairwise(NODES):
                time.sleep(0.3)
                moments[below] = snapshot(qmp, short_path, below, above)
            time.sleep(0.3)
            history = writer.finish()
        assert len(history.writes) > 1000, "the writer was held up: this was no load"
        qmp.execute("quit")
        daemon.wait()

    assert_chain_is_sound(short_path)
    for node, (before, after) in moments.items():
        history.check_moment(qemu.read_all(image(short_path, node), tmp_path), before, after)
    history.check_final(qemu.read_all(image(short_path, "D"), tmp_path))


def test_compare_agrees_with_a_model_kept_by_nbdcopy(short_path: Path, tmp_path: Path) -> None:
    qemu.create(image(short_path, "A"), SIZE)
    with running(short_path) as (daemon, qmp):
        for below, above in itertools.pairwise(NODES):
            with Writer(uri(short_path), SIZE, tmp_path, seed=ord(above)) as writer:
                time.sleep(0.1)
                writer.finish()
            subprocess.run(["nbdcopy", uri(short_path), tmp_path / f"{below}.raw"], check=True)
            snapshot(qmp, short_path, below, above)
        qmp.execute("quit")
        daemon.wait()
    assert_chain_is_sound(short_path)
    for node in "ABC":
        qemu.assert_same(image(short_path, node), tmp_path / f"{node}.raw", "-f", "qcow2", "-F", "raw")
    qemu.assert_same(image(short_path, "D"), tmp_path / "C.raw", "-f", "qcow2", "-F", "raw")


def test_human_monitor_on_stdio_answers_and_quits(short_path: Path) -> None:
    qemu.create(image(short_path, "A"), SIZE)
    with running(short_path) as (daemon, _qmp):
        assert daemon.child.stdin is not None
        daemon.child.stdin.write(b"info block\n")
        daemon.child.stdin.flush()
        daemon.wait_for_output("node-A: ./a.qcow2 (qcow2)")
        daemon.child.stdin.write(b"quit\n")
        daemon.child.stdin.flush()
        daemon.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"node_name": "node-X", "snapshot_file": "x.qcow2"}, "Cannot find device='' nor node-name='node-X'"),
        (
            {"node_name": "node-A", "snapshot_file": "x.qcow2", "snapshot_node_name": "node-A"},
            "New overlay node-name already in use",
        ),
    ],
)
def test_refused_snapshot_changes_nothing(short_path: Path, arguments: dict[str, str], message: str) -> None:
    qemu.create(image(short_path, "A"), SIZE)
    with running(short_path) as (daemon, qmp):
        before = qmp.execute("query-named-block-nodes", flat=True)
        with pytest.raises(QmpError) as refusal:
            qmp.execute("blockdev-snapshot-sync", **arguments)
        assert refusal.value.desc.startswith(message)
        assert qmp.execute("query-named-block-nodes", flat=True) == before
        qmp.execute("quit")
        daemon.wait()
    assert not (short_path / "x.qcow2").exists()
