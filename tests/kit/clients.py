"""NBD clients that overlap each other, and know what every sector may hold: load for tests that change things under it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any, Final

from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.sector_history import SECTOR, SectorHistory
from livedisk.nbd.client import NbdClient
from livedisk.nbd.client_handshake import NegotiationFailed

GONE: Final = (ConnectionError, EOFError)


class Clients:
    """Clients of one daemon that share ``sectors`` sectors. ``over``: they stop; ``done``: how much of what was done.

    What a client reads is judged at once (`SectorHistory`).
    """

    def __init__(self, daemon: Daemon, qmp: Qmp, history: SectorHistory, sectors: int) -> None:
        self.daemon, self.qmp, self.history, self.sectors = daemon, qmp, history, sectors
        self.over = False
        self.done: dict[str, int] = {}

    async def command(self, name: str, /, **arguments: Any) -> Any:
        """A QMP command, from a thread. Raises `kit.qmp.QmpError`."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await asyncio.to_thread(self.qmp.call, name, arguments)

    async def client(self, export: str, seed: int, *, depth: int = 4, vanishing: bool = False) -> None:
        """One connection after the other with ``depth`` requests in flight each; ``vanishing`` ones break off in mid-flight."""
        chance = random.Random(seed)
        while not self.over:
            try:
                client = await NbdClient.connect_unix(
                    str(self.daemon.nbd_socket), export, contexts=("base:allocation",)
                )
            except (OSError, EOFError, NegotiationFailed):
                return
            workers = [asyncio.create_task(self._work(client, random.Random(chance.random()))) for _ in range(depth)]
            try:
                if vanishing:
                    await asyncio.sleep(chance.uniform(0.02, 0.2))
                    client.abort()
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                client.abort()

    async def _work(self, client: NbdClient, chance: random.Random) -> None:
        # A disk that grew is larger only for those who connect afterwards.
        sectors = min(self.sectors, client.info.size // SECTOR)
        with contextlib.suppress(*GONE):
            while not self.over:
                kind = chance.choices(("write", "read", "zero", "trim", "flush", "look"), (50, 25, 8, 8, 4, 3))[0]
                count = chance.choice((1, 1, 2, 8, 8, 8, 16, 128, 128, 200, 300))
                if kind == "write" and chance.random() < 0.02:
                    count = sectors // 4 * 3
                start = chance.randrange(sectors - count + 1)
                if chance.random() < 0.5:
                    start -= start % 8 if count < 128 else start % 128
                await getattr(self, f"_{kind}")(client, chance, start, count)
                self.done[kind] = self.done.get(kind, 0) + 1

    async def _write(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count)
        fua = chance.random() < 0.03
        await client.write(start * SECTOR, self.history.data(change), fua=fua)
        self.history.done(change, stable=fua)

    async def _zero(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count, zeroes=True)
        await client.write_zeroes(start * SECTOR, count * SECTOR, may_unmap=chance.random() < 0.6)
        self.history.done(change)

    async def _trim(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        change = self.history.change(start, count, zeroes=True)
        await client.trim(start * SECTOR, count * SECTOR)
        self.history.done(change, certain=False)

    async def _read(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        look = self.history.look(start, count)
        try:
            data = await client.read(start * SECTOR, count * SECTOR)
        except BaseException:
            self.history.give_up(look)
            raise
        self.history.looked(look, data)

    async def _flush(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        flush = self.history.flush()
        await client.flush()
        self.history.flushed(flush)

    async def _look(self, client: NbdClient, chance: random.Random, start: int, count: int) -> None:
        if chance.random() < 0.5:
            await client.cache(start * SECTOR, count * SECTOR)
        else:
            await client.block_status(start * SECTOR, count * SECTOR)
