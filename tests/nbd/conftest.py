"""A server in a thread of its own, so that blocking peers and raw sockets can talk to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from kit.memory_export import MemoryExport
from livedisk.nbd.server import NbdServer

T = TypeVar("T")


class Served:
    """An `NbdServer` that runs in its own thread and loop, on a unix socket at ``path``."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = str(path)
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=uvloop.run, args=(self._main(),), daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.server = NbdServer(**self._options)
        self.server.listen_unix(self.path)
        self._started.set()
        await self._stop.wait()
        await self.server.close(grace_seconds=0.2)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the loop's thread and return what it returns."""

        async def run() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the loop's thread to its end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def export(self, size: int = 1 << 20, name: str = "", **options: Any) -> MemoryExport:
        """Add a `MemoryExport`."""
        export = MemoryExport(size, name, **options)
        self.call(self.server.add, export)
        return export

    def uri(self, name: str = "") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def serve(short_path: Path) -> Iterator[Callable[..., Served]]:
    """Makes servers; they are stopped at the end of the test."""
    servers: list[Served] = []

    def make(**options: Any) -> Served:
        servers.append(Served(short_path / f"s{len(servers)}", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """One server without exports."""
    return serve()
