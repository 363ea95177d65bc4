"""Long chains: they open, read, and are described without taking forever; beyond the limit there is an error."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kit.livedisk import Daemon as Process
from kit.qemu import create, qemu_img, qemu_io
from livedisk.emulator.block import graph
from livedisk.emulator.daemon import Daemon
from livedisk.emulator.errors import BlockError

SIZE = 1 << 20


def chain(folder: Path, length: int) -> Path:
    """qcow2 images, each on the one before; the lowest is full of 0x07."""
    below = create(folder / "0.qcow2", SIZE)
    qemu_io(below, f"write -P 7 0 {SIZE}")
    for number in range(1, length):
        above = folder / f"{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", above, str(SIZE))
        below = above
    return below


def test_a_chain_of_a_hundred_images_reads_through(short_path: Path) -> None:
    top = chain(short_path, 100)
    options = ["--blockdev", f"qcow2,node-name=top,file.driver=file,file.filename={top}"]
    options += ["--export", "nbd,id=top,node-name=top,writable=on"]
    with Process(short_path, *options) as daemon, daemon.qmp() as qmp:
        commands = [f"read -P 7 0 {SIZE}", "write -P 8 64k 64k", "read -P 8 64k 64k", "read -P 7 128k 64k"]
        qemu_io(daemon.uri("top"), *commands, format="raw")
        [described] = [node for node in qmp.execute("query-named-block-nodes") if node["node-name"] == "top"]
        assert described["backing_file_depth"] == 99
        daemon.stop(expect=0)


def test_names_of_a_long_chain_without_recorded_backing_files_are_found_quickly(short_path: Path) -> None:
    """Every name is then json:{...} of all below; found anew at each level, that doubled with every overlay."""
    with Process(short_path) as daemon, daemon.qmp() as qmp:
        qmp.execute("blockdev-add", driver="null-co", node_name="n0", size=SIZE)
        for number in range(1, 41):
            path = create(short_path / f"{number}.qcow2", SIZE)
            file = {"driver": "file", "filename": str(path)}
            qmp.execute("blockdev-add", driver="qcow2", node_name=f"n{number}", file=file, backing=None)
            qmp.execute("blockdev-snapshot", node=f"n{number - 1}", overlay=f"n{number}")
        started = time.monotonic()
        nodes = qmp.execute("query-named-block-nodes")
        assert time.monotonic() - started < 5
        [top] = [node for node in nodes if node["node-name"] == "n40"]
        assert top["file"].count('"driver": "qcow2"') == 40


def test_more_images_than_the_limit_are_refused(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_DEPTH", 5)
    top = chain(short_path, 8)

    async def scenario() -> None:
        daemon = Daemon()
        file = {"driver": "file", "filename": str(top)}
        options = daemon.parse_options({"driver": "qcow2", "node-name": "top", "file": file})
        with pytest.raises(BlockError, match="More than 5 images stand on each other"):
            await daemon.add_blockdev(options)
        assert daemon.graph.nodes == {}
        await daemon.close()

    asyncio.run(scenario())
