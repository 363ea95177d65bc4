"""Everything at once, on a real daemon: clients that share ranges, and whatever QMP can change under them, until kill -9.

A round starts ``livedisk daemon`` on the newest image of a chain, lets clients read, write, zero, discard and flush without
pause, through a device's door and through an export of the node, while one task changes the graph: snapshots, transactions
that fail, reopen, resize, stop and cont, exports that come and go with clients in mid-flight. Then the daemon is killed or
stopped. What the image holds must be what `SectorHistory` allows, ``qemu-img check`` must find at most leaks (after a kill),
and no image may have changed since it became a backing file. The next round goes on from there.

The choices come from a seed, the timing does not: the same seed does the same kinds of things. ``STRESS_SEED=n`` runs that
seed for every variant, ``STRESS_SECONDS`` sets the length of a round; ``--soak`` runs many seeds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from kit.clients import Clients
from kit.livedisk import Daemon
from kit.peers import run
from kit.qemu import check, create, qemu_img, read_all
from kit.qmp import Qmp, QmpError
from kit.sector_history import SECTOR, SectorHistory
from livedisk.nbd.client import NbdClient

SHARED: Final = 12288
"""Sectors that all clients use (6 MiB)."""
TAIL: Final = 4096
"""Sectors behind them that come and go with block_resize."""
ROUNDS: Final = 2
SECONDS: Final = float(os.environ.get("STRESS_SECONDS", "0.8"))
LONGEST_CHAIN: Final = 7

VARIANTS: Final = {
    "plain": ("", {}),
    "tiny": ("cluster_size=512", {}),
    "thin": ("refcount_bits=1,cluster_size=4096", {}),
    "wide": ("refcount_bits=64,cluster_size=2M", {}),
    "lazy": ("lazy_refcounts=on", {"lazy-refcounts": True}),
    "subclusters": ("extended_l2=on,cluster_size=64k", {}),
    "old": ("compat=0.10", {}),
    "data-file": ("data_file={folder}/data.raw", {}),
    "raw-data-file": ("data_file={folder}/data.raw,data_file_raw=on", {}),
    "small-cache": (
        "cluster_size=4096",
        {"l2-cache-size": 8192, "refcount-cache-size": 16384, "l2-cache-entry-size": 4096},
    ),
    "compressed": ("", {}),
    "internal-snapshot": ("", {}),
    "direct": ("", {"cache": {"direct": True}}),
    "detect-zeroes": ("", {"detect-zeroes": "unmap"}),
}


class Disk:
    """The chain of images on disk and what its top may hold."""

    def __init__(self, folder: Path, name: str, seed: int) -> None:
        layout, self.options = VARIANTS[name]
        self.folder = folder
        self.chance = random.Random(f"{name} {seed}")
        self.history = SectorHistory(SHARED)
        self.serial = 0
        self.chain = [create(folder / "0.qcow2", SHARED * SECTOR, options=layout.format(folder=folder))]
        self.frozen: dict[Path, str] = {}
        self.may_snapshot = "data_file_raw" not in layout
        self.may_resize = name not in ("internal-snapshot",)
        self.version = 2 if "compat=0.10" in layout else 3
        if name in ("compressed", "internal-snapshot"):
            self._fill(name)

    def _fill(self, name: str) -> None:
        """Begin with content that is compressed, or that an internal snapshot shares."""
        change = self.history.change(0, SHARED)
        (self.folder / "fill.raw").write_bytes(self.history.data(change))
        self.history.done(change)
        compress = ["-c"] if name == "compressed" else []
        qemu_img("convert", *compress, "-f", "raw", "-O", "qcow2", self.folder / "fill.raw", self.top)
        if name == "internal-snapshot":
            qemu_img("snapshot", "-c", "before", self.top)
            self.frozen_inside = hashlib.sha256((self.folder / "fill.raw").read_bytes()).hexdigest()
        self.history.ended((self.folder / "fill.raw").read_bytes(), crashed=False)

    @property
    def top(self) -> Path:
        return self.chain[-1]

    def next_image(self) -> Path:
        self.serial += 1
        return self.folder / f"{self.serial}.qcow2"

    def freeze(self, image: Path) -> None:
        """From now on the image must not change."""
        self.frozen[image] = digest(image)

    def ended(self, *, crashed: bool) -> None:
        """The daemon is gone: look at everything that it left."""
        for image, wanted in self.frozen.items():
            assert digest(image) == wanted, f"{image.name} changed after it became a backing file"
        dirty = bool(self.top.read_bytes()[79] & 1) and self.version == 3
        assert crashed or not dirty
        if not dirty:
            check(self.top, leaks=crashed)
        image = read_all(self.top, self.folder)
        assert len(image) >= SHARED * SECTOR
        self.history.ended(image[: SHARED * SECTOR], crashed=crashed)
        if crashed and not dirty:
            run(["qemu-img", "check", "-r", "leaks", self.top], expect=None)
            check(self.top)
        for image_path in self.chain[:-1]:
            check(image_path)
        if hasattr(self, "frozen_inside"):
            first = self.folder / "inside.raw"
            qemu_img("convert", "-l", "before", "-O", "raw", self.chain[0], first)
            assert hashlib.sha256(first.read_bytes()).hexdigest() == self.frozen_inside, "the internal snapshot changed"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stress(Clients):
    """One round: a daemon, its clients and its operator."""

    def __init__(self, disk: Disk, daemon: Daemon, qmp: Qmp) -> None:
        super().__init__(daemon, qmp, disk.history, SHARED)
        self.disk = disk
        self.chance = disk.chance
        self.node = "n0"
        self.exports = 0

    # -- the operator ----------------------------------------------------------------------------------------------------
    async def operate(self) -> None:
        """Change things, one after the other."""
        acts: list[Callable[[], Awaitable[None]]] = [
            self.snapshot, self.snapshot, self.failing_transaction, self.reopen, self.resize, self.pause, self.second_door,
            self.deep_export, self.deep_export, self.queries,
        ]  # fmt: skip
        while not self.over:
            await asyncio.sleep(self.chance.uniform(0.01, 0.08))
            act = self.chance.choice(acts)
            await act()
            self.done[act.__name__] = self.done.get(act.__name__, 0) + 1

    async def snapshot(self) -> None:
        disk = self.disk
        if len(disk.chain) >= LONGEST_CHAIN or not disk.may_snapshot:
            return
        image, old = disk.next_image(), disk.top
        overlay = f"n{disk.serial}"
        data = {"node-name": self.node, "snapshot-file": str(image), "snapshot-node-name": overlay}
        actions = [{"type": "blockdev-snapshot-sync", "data": data}]
        images = [image]
        if self.chance.random() < 0.3:  # two at once
            images.append(disk.next_image())
            above = f"n{disk.serial}"
            data = {"node-name": overlay, "snapshot-file": str(images[1]), "snapshot-node-name": above}
            actions.append({"type": "blockdev-snapshot-sync", "data": data})
            overlay = above
        await self.command("transaction", actions=actions)
        self.node = overlay
        for each in (old, *images[:-1]):
            disk.freeze(each)
        disk.chain += images

    async def failing_transaction(self) -> None:
        if not self.disk.may_snapshot:
            return
        image = self.disk.next_image()
        data = {"node-name": self.node, "snapshot-file": str(image), "snapshot-node-name": "never"}
        with pytest.raises(QmpError, match="Abort action"):
            await self.command(
                "transaction", actions=[{"type": "blockdev-snapshot-sync", "data": data}, {"type": "abort", "data": {}}]
            )
        image.unlink()

    def blockdev(self, **more: Any) -> dict[str, Any]:
        """The options of the newest image's node."""
        return {
            "driver": "qcow2", "node-name": self.node, "discard": "unmap",
            "file": {"driver": "file", "filename": str(self.disk.top), "discard": "unmap"}, **self.disk.options, **more,
        }  # fmt: skip

    async def reopen(self) -> None:
        """Other options, and the old ones again."""
        graph = await self.command("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        mine = next(node["id"] for node in graph["nodes"] if node["name"] == self.node)
        children = {edge["name"]: names[edge["child"]] for edge in graph["edges"] if edge["parent"] == mine}
        options = self.blockdev(**{**self.disk.options, "backing": children.get("backing"), "file": children["file"]})
        options["discard"] = self.chance.choice(("ignore", "unmap"))
        options["l2-cache-size"] = self.chance.choice((8192, 1 << 20))
        options["detect-zeroes"] = self.chance.choice(("off", "on"))
        options["overlap-check"] = self.chance.choice(("all", "none", "cached"))
        if self.disk.version == 3:
            options["lazy-refcounts"] = self.chance.random() < 0.5
        options.pop("l2-cache-entry-size", None)
        await self.command("blockdev-reopen", options=[options])

    async def resize(self) -> None:
        """Grow, write the new end, shrink, grow: it must be zero then."""
        if not self.disk.may_resize:
            return
        await self._resize_to(SHARED + TAIL - self.chance.choice((0, 1, 7, 100)))
        client = await NbdClient.connect_unix(str(self.daemon.nbd_socket), "guest")
        try:
            start = SHARED + self.chance.randrange(TAIL // 2)
            await client.write(start * SECTOR, b"tail" * (SECTOR // 4) * 64)
            assert await client.read(start * SECTOR, 64 * SECTOR) == b"tail" * (SECTOR // 4) * 64
            await self._resize_to(SHARED)
            await self._resize_to(SHARED + TAIL)
            assert not any(await client.read(SHARED * SECTOR, TAIL * SECTOR)), "what was cut off came back"
        finally:
            client.abort()

    async def _resize_to(self, sectors: int) -> None:
        arguments = {"node-name": self.node, "size": sectors * SECTOR}
        await asyncio.to_thread(self.qmp.call, "block_resize", arguments)

    async def pause(self) -> None:
        await self.command("stop")
        await asyncio.sleep(self.chance.uniform(0, 0.03))
        await self.command("cont")

    async def second_door(self) -> None:
        """An export of the node itself comes, its client works, and is thrown out in mid-flight."""
        self.exports += 1
        name = f"door{self.exports}"
        await self.command("block-export-add", type="nbd", id=name, node_name=self.node, name=name, writable=True)
        worker = asyncio.create_task(self.client(name, self.chance.randrange(1 << 30)))
        await asyncio.sleep(self.chance.uniform(0.02, 0.2))
        if self.chance.random() < 0.3:
            await self.snapshot()
        await self.command("block-export-del", id=name, mode="hard")
        await worker
        await self.exports_gone(name)

    async def exports_gone(self, name: str) -> None:
        while any(known["id"] == name for known in await self.command("query-block-exports")):
            await asyncio.sleep(0.01)

    async def deep_export(self) -> None:
        """An export of a backing image shows the same at all times."""
        images = await self.command("query-named-block-nodes", flat=True)
        named = {node["file"]: node["node-name"] for node in images if node["drv"] == "qcow2"}
        if len(self.disk.chain) < 2:
            return
        image = self.chance.choice(self.disk.chain[:-1])
        self.exports += 1
        name = f"deep{self.exports}"
        await self.command("block-export-add", type="nbd", id=name, node_name=named[str(image)], name=name)
        client = await NbdClient.connect_unix(str(self.daemon.nbd_socket), name)
        try:
            start = self.chance.randrange(SHARED - 2048)
            before = await client.read(start * SECTOR, 2048 * SECTOR)
            for _ in range(5):
                await asyncio.sleep(0.01)
                assert await client.read(start * SECTOR, 2048 * SECTOR) == before, (
                    f"{image.name} changed under its export"
                )
        finally:
            client.abort()
        await self.command("block-export-del", id=name, mode="hard")
        await self.exports_gone(name)

    async def queries(self) -> None:
        for name in ("query-block", "query-blockstats", "query-named-block-nodes", "x-debug-query-block-graph"):
            await self.command(name)


async def load(stress: Stress, *, seconds: float) -> None:
    """Clients and operator for that long; then everybody stops, or is stopped by the daemon's end."""
    chance = stress.chance
    clients = [stress.client("guest", chance.randrange(1 << 30)) for _ in range(3)]
    clients += [stress.client("guest", chance.randrange(1 << 30), vanishing=True)]
    operator = asyncio.create_task(stress.operate())
    working = [asyncio.create_task(each) for each in clients]
    await asyncio.wait([operator, *working], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    broken = [task for task in (operator, *working) if task.done() and task.exception() is not None]
    if not broken and chance.random() < 0.6:
        stress.daemon.kill()  # in the middle of everything
    stress.over = True
    _, late = await asyncio.wait([operator, *working], timeout=20)
    for task in broken:
        task.result()
    killed = not stress.daemon.running
    for task in late:
        task.cancel()
    results = await asyncio.gather(operator, *working, return_exceptions=True)
    assert not late, "requests without an answer"
    for result in results:
        if isinstance(result, BaseException) and not (killed and isinstance(result, (OSError, EOFError, QmpError))):
            raise result


def one_round(disk: Disk, folder: Path) -> bool:
    """Start, load, end. Whether the daemon was killed."""
    node = {
        "driver": "qcow2", "node-name": "n0", "discard": "unmap", **disk.options,
        "file": {"driver": "file", "filename": str(disk.top), "discard": "unmap"},
    }  # fmt: skip
    options = ["--blockdev", json.dumps(node), "--device", "virtio-blk,drive=n0,id=d0,share-rw=on"]
    with Daemon(folder, *options) as daemon, daemon.qmp() as qmp:
        qmp.call(
            "block-export-add", {"type": "nbd", "id": "guest", "node-name": "d0", "name": "guest", "writable": True}
        )
        stress = Stress(disk, daemon, qmp)
        asyncio.run(load(stress, seconds=SECONDS))
        print(dict(sorted(stress.done.items())))
        if daemon.running:
            # The next round begins with a disk of the usual size.
            if disk.may_resize:
                qmp.call("block_resize", {"node-name": stress.node, "size": SHARED * SECTOR})
            daemon.stop(expect=0)
            return False
        return True


def stress_a_disk(folder: Path, name: str, seed: int, rounds: int) -> None:
    disk = Disk(folder, name, seed)
    for _ in range(rounds):
        crashed = one_round(disk, folder)
        adopt_what_the_crash_left(disk)
        disk.ended(crashed=crashed)


def adopt_what_the_crash_left(disk: Disk) -> None:
    """A kill may fall between the making of an overlay and the word of it: what was not told of is not part of the chain."""
    for path in disk.folder.glob("*.qcow2"):
        if path not in disk.chain:
            path.unlink()


SEEDS = [int(os.environ["STRESS_SEED"])] if "STRESS_SEED" in os.environ else [1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_lost_whatever_happens(name: str, seed: int, short_path: Path) -> None:
    stress_a_disk(short_path, name, seed, ROUNDS)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 120))
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_lost_in_the_long_run(name: str, seed: int, short_path: Path) -> None:
    stress_a_disk(short_path, name, seed, 6)
