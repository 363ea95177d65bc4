"""Writes to an image until it is killed: the offset of each acknowledged write is printed. Started by test_bitmaps.py."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from kit.qcow2_disk import opened


async def main(path: str, seed: int) -> None:
    chance = random.Random(seed)
    async with opened(Path(path)) as disk:
        while True:
            offset = chance.randrange(disk.backend.size // 4096) * 4096
            await disk.write(offset, chance.randbytes(4096))
            print(offset, flush=True)


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
