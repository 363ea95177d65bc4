"""Clusters that were taken and given back: refcounts say of every cluster what it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kit.qcow2_disk import opened
from kit.qemu import check, create


def test_what_is_given_back_does_not_join_a_run_of_another_refcount_block(tmp_path: Path) -> None:
    """A slow write fails after others took the rest of its refcount block, and the free run begins where the next one does."""
    path = create(tmp_path / "image.qcow2", 1 << 20, options="cluster_size=512,refcount_bits=64")

    async def act() -> None:
        async with opened(path) as disk:
            allocator = disk.image.allocator
            per_block = allocator.refcounts.per_block

            async def count(cluster: int) -> int:
                block = await allocator.refcounts.block(cluster // per_block)
                assert block is not None
                return allocator.refcounts.counts(block, cluster, 1)[0]

            # A table over two blocks has the second block before it, so that all of what the second describes becomes free.
            start = await allocator.contiguous(2 * per_block) // 512
            for cluster in range(start, start + 2 * per_block):
                allocator.give_back(cluster * 512, 1)
            taken = [await allocator.cluster() // 512]
            while (taken[-1] + 1) % per_block or taken[-1] < start:
                taken.append(await allocator.cluster() // 512)
            await allocator.ensure()
            end = taken[-1] + 1
            failed = taken[-2:]
            allocator.give_back(failed[0] * 512, 2)
            again = [await allocator.cluster() // 512 for _ in range(4)]
            assert again == [*failed, end, end + 1]
            assert [await count(cluster) for cluster in again] == [1] * 4
            assert await count(end + per_block - 2) == 0
            for cluster in {*taken, *again}:
                allocator.give_back(cluster * 512, 1)

    asyncio.run(act())
    check(path)
