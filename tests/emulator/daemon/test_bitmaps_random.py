"""Random writes and commands on a chain of images: no bitmap ever misses a change of what its node shows.

Through snapshots, streams, commits, resizes and restarts. The model is the simplest there is: what each node showed when each of
its bitmaps was started or cleared. Whatever differs from that now must be dirty, and only what was written may be.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.qemu import check, create
from livedisk.emulator.block.backend import BlockBackend
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.daemon import RECURSION, Daemon
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.registry import load_plugins, registry

load_plugins()
sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION))  # as the daemon will, under hypothesis's eyes

SIZE = 1 << 20
GRANULARITIES = [512, 4096, 65536]
places = st.integers(0, 2 * SIZE // 512 - 1).map(lambda number: number * 512)
lengths = st.sampled_from([512, 4096, 5120, 65536, 200_704])
names = st.sampled_from(["a", "b", "c"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), places, lengths, st.integers(0, 255)),
        st.tuples(st.just("write"), places, lengths, st.integers(0, 255)),
        st.tuples(st.just("zero"), places, lengths),
        st.tuples(st.just("discard"), places, lengths),
        st.tuples(st.just("add"), st.integers(0, 3), names, st.sampled_from(GRANULARITIES), st.booleans()),
        st.tuples(st.just("add"), st.just(0), names, st.sampled_from(GRANULARITIES), st.booleans()),
        st.tuples(st.just("clear"), st.integers(0, 3), names),
        st.tuples(st.just("remove"), st.integers(0, 3), names),
        st.tuples(st.just("merge"), st.integers(0, 3), names, names),
        st.tuples(st.just("snapshot")),
        st.tuples(st.just("stream")),
        st.tuples(st.just("commit")),
        st.tuples(st.just("commit-active")),
        st.tuples(st.just("resize"), st.sampled_from([SIZE // 2, SIZE, 3 * SIZE // 2])),
        st.tuples(st.just("restart")),
        st.tuples(st.just("flush")),
    ),
    min_size=4,
    max_size=25,
)


class Chain:
    """A daemon with a chain of images, the last one written to, and what bitmaps must know."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[tuple[str, Path]] = []
        self.bases: dict[tuple[str, str], bytes] = {}
        """What a node showed when its bitmap was started; by node and bitmap."""
        self.persistent: set[tuple[str, str]] = set()
        self.made = 0
        self.daemon: Daemon
        self.guest: BlockBackend

    # -- the daemon
    async def start(self) -> None:
        self.daemon = Daemon()
        options: Any = None
        for name, path in self.images:
            file = {"driver": "file", "filename": str(path)}
            options = {"driver": "qcow2", "node-name": name, "file": file, "backing": options, "discard": "unmap"}
        await self.run("blockdev-add", **options)
        self.attach()

    def attach(self) -> None:
        self.guest = BlockBackend(self.daemon.graph, "guest")
        self.daemon.graph.attach_root(self.guest, self.daemon.graph.find(self.top), Perm.ALL & ~Perm.RESIZE, Perm.ALL)

    async def end(self) -> None:
        await self.daemon.graph.detach_root(self.guest)
        await self.daemon.close()

    async def run(self, name: str, /, **arguments: Any) -> Any:
        await asyncio.sleep(0)
        return await registry.get(name).run(
            Context(self.daemon), {key.replace("_", "-"): value for key, value in arguments.items()}
        )

    async def job(self, name: str, /, **arguments: Any) -> None:
        await self.run(name, job_id="job", auto_dismiss=False, **arguments)
        completing = False
        while True:
            [job] = await self.run("query-jobs")
            if job.status == "ready" and not completing:
                completing = True
                await self.run("job-complete", id="job")
            if job.status == "concluded":
                break
            await asyncio.sleep(0.001)
        assert isinstance(getattr(job, "error", None), type(None)) or not isinstance(job.error, str), job.error
        await self.run("job-dismiss", id="job")

    @property
    def top(self) -> str:
        return self.images[-1][0]

    def new(self) -> tuple[str, Path]:
        self.made += 1
        return f"n{self.made}", self.folder / f"{self.made}.qcow2"

    async def shown(self, name: str) -> bytes:
        node = self.daemon.graph.find(name)
        view = bytearray(node.size)
        await node.read(0, memoryview(view))
        return bytes(view)

    def place(self, depth: int) -> str:
        return self.images[-1 - depth % len(self.images)][0]

    # -- what a guest does
    def clip(self, offset: int, length: int) -> tuple[int, int]:
        size = self.guest.size
        offset = min(offset, size - 512)
        return offset, min(length, size - offset)

    async def write(self, offset: int, length: int, fill: int) -> None:
        offset, length = self.clip(offset, length)
        data = memoryview(bytes([fill]) * length)
        if not self.guest.try_write(offset, data):
            await self.guest.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        await self.guest.write_zeroes(*self.clip(offset, length))

    async def discard(self, offset: int, length: int) -> None:
        await self.guest.discard(*self.clip(offset, length))

    async def flush(self) -> None:
        await self.guest.flush()

    # -- bitmaps
    async def add(self, depth: int, bitmap: str, granularity: int, persistent: bool) -> None:
        node = self.place(depth)
        if (node, bitmap) in self.bases:
            return
        persistent = persistent and not self.daemon.graph.find(node).read_only
        await self.run("block-dirty-bitmap-add", node=node, name=bitmap, granularity=granularity, persistent=persistent)
        self.bases[node, bitmap] = await self.shown(node)
        if persistent:
            self.persistent.add((node, bitmap))

    async def clear(self, depth: int, bitmap: str) -> None:
        node = self.place(depth)
        if (node, bitmap) in self.bases and not self.daemon.graph.find(node).bitmaps.get(bitmap).read_only:
            await self.run("block-dirty-bitmap-clear", node=node, name=bitmap)
            self.bases[node, bitmap] = await self.shown(node)

    async def remove(self, depth: int, bitmap: str) -> None:
        node = self.place(depth)
        if (node, bitmap) in self.bases and not self.daemon.graph.find(node).bitmaps.get(bitmap).read_only:
            await self.run("block-dirty-bitmap-remove", node=node, name=bitmap)
            del self.bases[node, bitmap]
            self.persistent.discard((node, bitmap))

    async def merge(self, depth: int, bitmap: str, source: str) -> None:
        """A bitmap that was cleared gets back what an older one knows: it is as old as that one."""
        node = self.place(depth)
        keys = (node, bitmap), (node, source)
        if bitmap == source or any(key not in self.bases for key in keys):
            return
        if self.daemon.graph.find(node).bitmaps.get(bitmap).read_only:
            return
        await self.run("block-dirty-bitmap-clear", node=node, name=bitmap)
        await self.run("block-dirty-bitmap-merge", node=node, target=bitmap, bitmaps=[source])
        self.bases[keys[0]] = self.bases[keys[1]]

    # -- the chain
    async def snapshot(self) -> None:
        name, path = self.new()
        await self.run("blockdev-snapshot-sync", node_name=self.top, snapshot_file=str(path), snapshot_node_name=name)
        self.images.append((name, path))

    async def stream(self) -> None:
        if len(self.images) > 1:
            await self.job("block-stream", device=self.top)
            self.gone(self.images[:-1])

    async def commit(self) -> None:
        if len(self.images) > 2:
            middle = self.images[-2]
            await self.job("block-commit", device=self.top, top_node=middle[0], base_node=self.images[-3][0])
            self.gone([middle])

    async def commit_active(self) -> None:
        if len(self.images) > 1:
            top = self.images[-1]
            await self.job("block-commit", device=top[0], base_node=self.images[-2][0])
            self.gone([top])
            if top[0] in self.daemon.graph.nodes:  # the user's own
                await self.run("blockdev-del", node_name=top[0])

    def gone(self, images: list[tuple[str, Path]]) -> None:
        """These are not in the chain any more; their bitmaps went with their nodes."""
        left = {name for name, _ in images}
        self.images = [image for image in self.images if image[0] not in left]
        for key in [key for key in self.bases if key[0] in left]:
            del self.bases[key]
            self.persistent.discard(key)

    async def resize(self, size: int) -> None:
        if len(self.images) > 1:
            return  # an overlay of another size than its backing file is a matter of its own
        await self.run("block_resize", node_name=self.top, size=size)

    async def restart(self) -> None:
        await self.end()
        for _, path in self.images:
            check(path)
        self.bases = {key: base for key, base in self.bases.items() if key in self.persistent}
        await self.start()

    # -- the judgement
    async def judge(self) -> None:
        for (name, bitmap), base in self.bases.items():
            now = await self.shown(name)
            found = self.daemon.graph.find(name).bitmaps.get(bitmap)
            assert not found.inconsistent
            assert found.size == len(now)
            for at in range(0, min(len(base), len(now)), 512):
                if base[at : at + 512] != now[at : at + 512]:
                    assert found.any(at, 1), f"{bitmap} of {name} misses {at}"


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(steps)
def test_no_bitmap_misses_a_change(operations: list[tuple[Any, ...]]) -> None:
    async def scene() -> None:
        with tempfile.TemporaryDirectory() as folder:
            chain = Chain(Path(folder))
            first = chain.new()
            create(first[1], SIZE, options="cluster_size=4k")
            chain.images.append(first)
            await chain.start()
            try:
                for name, *arguments in operations:
                    await getattr(chain, name.replace("-", "_"))(*arguments)
                    await chain.judge()
            finally:
                await chain.end()
            for _, path in chain.images:
                check(path)

    asyncio.run(scene())
