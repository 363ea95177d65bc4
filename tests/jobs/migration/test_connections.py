"""Connections of migrations that say nothing, in this process: what takes seconds on the outside."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from livedisk.emulator.block.sockets import UnixAddress
from livedisk.jobs.migration import incoming
from livedisk.jobs.migration.migration import Migration
from livedisk.jobs.migration.wire import MAGIC, Channel, MigrationError, Welcome


def test_who_says_nothing_is_let_go_and_the_next_is_heard(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(asyncio.wait_for(_after_silence(short_path, monkeypatch), 20))


async def _after_silence(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "_GREETING", 0.1)
    daemon = SimpleNamespace(run_state=SimpleNamespace(before_run=[]))
    address = UnixAddress(path=str(short_path / "guest"))
    waiting = incoming.Incoming(Migration(daemon), exit_on_error=False)  # type: ignore[arg-type]
    await waiting.open(address)
    found = asyncio.create_task(waiting._first_migration())
    with socket.socket(socket.AF_UNIX) as silent:
        silent.setblocking(False)
        await asyncio.get_running_loop().sock_connect(silent, address.path)
        assert await asyncio.get_running_loop().sock_recv(silent, 1) == b""
        # The next connection gets the number that the silent one had.
        monkeypatch.setattr(incoming, "_GREETING", 20)
        _, writer = await asyncio.open_unix_connection(address.path)
        writer.write(MAGIC)
        channel = await found
    writer.close()
    channel.abort()
    assert not os.path.exists(address.path)


def test_an_answer_that_does_not_come_is_told_by_its_time() -> None:
    asyncio.run(asyncio.wait_for(_no_answer(), 20))


async def _no_answer() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(*await asyncio.open_connection(sock=ours), "destination")
        with pytest.raises(MigrationError, match=r"the destination did not answer within 0\.01 seconds"):
            async with channel.within(0.01):
                await channel.expect(Welcome)
        channel.abort()
