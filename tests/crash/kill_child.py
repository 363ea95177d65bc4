"""Writes to an image until it is killed: each flushed write is reported on stdout. Started by test_kill.py."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from kit.qcow2_disk import opened

BLOCK = 4096


async def main(path: str, seed: int) -> None:
    chance = random.Random(seed)
    version = 0
    async with opened(Path(path)) as disk:
        while True:
            version += 1
            places = [chance.randrange(disk.backend.size // BLOCK) for _ in range(8)]
            data = version.to_bytes(8, "big") * (BLOCK // 8)
            await asyncio.gather(*(disk.write(place * BLOCK, data) for place in places))
            if version % 3 == 0:
                await disk.backend.discard(chance.randrange(8) * 65536 + disk.backend.size // 2, 65536)
            await disk.backend.flush()
            print(version, *places, flush=True)


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
