"""Clients that lie, stall, flood or vanish: they get an error or are gone, cost a bounded amount, and nobody else suffers."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import struct
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit import raw_nbd as raw
from kit.raw_nbd import Gone, RawClient, request
from livedisk.nbd.buffers import Limits

from .conftest import Served
from .test_server import until

Serve = Callable[..., Served]


def alive(served: Served) -> None:
    """Another client is served at once."""
    with RawClient(served.path).enter() as client:
        client.send(request(raw.READ, 0, 4096))
        assert client.reply(4096)[0][1] == 0


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_bad_magic_gets_one_last_reply(served: Served, mode: int) -> None:
    served.export()
    with RawClient(served.path).enter(mode=mode) as client:
        good = request(raw.READ, 0, 16, cookie=1, extended=mode == 2)
        client.send(good, request(raw.READ, 0, 16, magic=0x25609511, extended=mode == 2), good)
        # The two answers may come in any order, the last request gets none.
        replies = {reply[2 if mode == 0 else 3]: reply for reply in (client.reply(16)[0], client.reply(16)[0])}
        assert set(replies) == {1, 7}
        assert replies[7][1] == errno.EINVAL if mode == 0 else b"invalid magic (got 0x25609511" in replies[7][5]
        assert client.gone()
    alive(served)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_payload_larger_than_any_limit_gets_one_last_reply(served: Served, mode: int) -> None:
    served.export()
    with RawClient(served.path).enter(mode=mode) as client:
        client.send(request(raw.WRITE, 0, (32 << 20) + 1, extended=mode == 2))
        reply = client.reply()[0]
        assert (
            reply[1] == errno.EINVAL if mode == 0 else b"len (33554433) is larger than max len (33554432)" in reply[5]
        )
        assert client.gone()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("length", [512, 100_000, 3 << 20])
@pytest.mark.parametrize("trouble", ["flags", "range", "read-only"])
def test_refused_writes_swallow_their_payload(served: Served, mode: int, length: int, trouble: str) -> None:
    export = served.export(4 << 20, read_only=trouble == "read-only")
    expected = {"flags": errno.EINVAL, "range": errno.ENOSPC, "read-only": errno.EPERM}[trouble]
    with RawClient(served.path).enter(mode=mode) as client:
        flags = (raw.PAYLOAD if mode == 2 else 0) | (raw.REQ_ONE if trouble == "flags" else 0)
        offset = (4 << 20) - 1 if trouble == "range" else 0
        # A payload that looks like requests must not be taken for them.
        payload = (request(raw.FLUSH, cookie=666, extended=mode == 2) * (length // 28 + 1))[:length]
        client.send(request(raw.WRITE, offset, length, flags, payload=payload, extended=mode == 2))
        client.send(request(raw.READ, 0, 16, cookie=9, extended=mode == 2))
        reply = client.reply()[0]
        error = reply[1] if mode == 0 else struct.unpack(">I", reply[5][:4])[0]
        assert (error, reply[2] if mode == 0 else reply[3]) == (expected, 7)
        assert client.reply(16)[-1][2 if mode == 0 else 3] == 9
    assert not any(name.startswith("write") or name == "flush" for name, _, _ in export.log)


@pytest.mark.parametrize("size", [0, 8, 16, 20, 3 << 20])
def test_status_payload_that_is_not_valid(served: Served, size: int) -> None:
    served.export()
    with RawClient(served.path).enter(mode=2, contexts=(b"base:allocation",)) as client:
        # The last id is one that was not negotiated.
        payload = struct.pack(">Q", 4096) + bytes(max(0, size - 12)) + b"\0\0\0\1" if size else b""
        payload = payload[:size]
        client.send(request(raw.STATUS, 0, len(payload), raw.PAYLOAD, payload=payload, extended=True))
        reply = client.reply()[0]
        assert (reply[2], b"need non-zero length" if not size else b"CMD_BLOCK_STATUS payload not valid") == (
            0x8001,
            reply[5][6:],
        )
        client.send(request(raw.READ, 0, 16, extended=True))
        client.reply()


@pytest.mark.parametrize("sent", [1, 27, 28, 5000, 1 << 20, 3 << 20])
def test_vanishing_in_the_middle_of_a_request(served: Served, sent: int) -> None:
    export = served.export(8 << 20)
    stream = request(raw.WRITE, 0, 4 << 20, payload=b"z" * (4 << 20))
    client = RawClient(served.path).enter()
    client.send(stream[:sent])
    client.sock.close()
    until(lambda: export.clients == [])
    assert export.log == []
    alive(served)


def test_vanishing_with_replies_on_their_way(served: Served) -> None:
    export = served.export()
    for _ in range(20):
        client = RawClient(served.path).enter()
        client.send(request(raw.READ, 0, 1 << 20) * 8, request(raw.FLUSH) * 50)
        client.sock.close()
    until(lambda: export.clients == [])
    alive(served)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flood(client: RawClient, data: bytes, seconds: float = 0.3) -> int:
    """Send without ever reading until the server takes no more; how much it took."""
    client.sock.settimeout(seconds)
    total = 0
    try:
        while total < 512 << 20:
            total += client.sock.send(data)
    except TimeoutError:
        return total
    pytest.fail(f"the server took {total} bytes without being read")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_flood_of_reads_that_are_never_collected(served: Served, mode: int, fast: bool) -> None:
    export = served.export(4 << 20, fast=fast)
    export.fill(0, b"x" * export.size)
    before = resident()
    with RawClient(served.path).enter(mode=mode) as client:
        taken = flood(client, request(raw.READ, 0, 1 << 20, extended=mode == 2) * 1000)
        assert taken < 8 << 20
        assert resident() - before < 160 << 20
        alive(served)
    until(lambda: len(export.clients) == 0)
    assert served.server._shared.budget.held == 0


def test_flood_of_refused_requests(served: Served) -> None:
    served.export()
    before = resident()
    with RawClient(served.path).enter(mode=1) as client:
        flood(client, request(42) * 1000)
        assert resident() - before < 64 << 20
        alive(served)


def test_flood_of_options(served: Served) -> None:
    for index in range(100):
        served.export(512, f"{index}" + "x" * 1000)
    served.export()
    before = resident()
    with RawClient(served.path).hello() as client:
        flood(client, raw.opt(raw.LIST) * 10)
        assert resident() - before < 64 << 20
        alive(served)


def test_slow_requests_have_a_limit_and_all_get_done(serve: Serve) -> None:
    served = serve(limits=Limits(requests_per_connection=4, bytes_per_connection=1 << 20, bytes_in_total=2 << 20))
    export = served.export(fast=False)
    running, worst = 0, 0

    async def count(*_: object) -> None:
        nonlocal running, worst
        running += 1
        worst = max(worst, running)
        await asyncio.sleep(0.001)
        running -= 1

    export.hook = count
    with RawClient(served.path).enter() as client:
        client.send(*(request(raw.READ, 0, 512, cookie=cookie) for cookie in range(100)))
        assert sorted(client.reply(512)[0][2] for _ in range(100)) == list(range(100))
        assert worst == 4
        worst = 0
        client.send(*(request(raw.READ, 0, 400_000, cookie=cookie) for cookie in range(10)))
        assert sorted(client.reply(400_000)[0][2] for _ in range(10)) == list(range(10))
        assert worst == 2  # two of them make 800 000 bytes, three would be too much


def test_hoarding_the_whole_budget_starves_nobody(serve: Serve) -> None:
    served = serve(limits=Limits(bytes_per_connection=8 << 20, bytes_in_total=8 << 20))
    export = served.export(8 << 20, fast=False)
    hoarders = []
    for _ in range(4):
        client = RawClient(served.path).enter()
        # Announced, never sent: the memory is set aside, and another of the same waits behind it.
        client.send(request(raw.WRITE, 0, 6 << 20, payload=b"x"))
        hoarders.append(client)
    alive(served)
    with RawClient(served.path).enter() as client:
        client.send(request(raw.WRITE, 0, 5 << 20, payload=b"y" * (5 << 20)), request(raw.READ, 0, 16))
        assert client.reply()[0][1] == 0
        assert client.reply(16)[0][3] == b"y" * 16
    for client in hoarders:
        client.sock.close()
    until(lambda: not export.clients)
    assert served.server._shared.budget.held == 0


def test_announced_payload_costs_no_memory_before_it_comes(served: Served) -> None:
    served.export(64 << 20)
    before = resident()
    clients = []
    for _ in range(20):
        client = RawClient(served.path).enter()
        client.send(request(raw.WRITE, 0, 32 << 20, payload=b"x"))
        clients.append(client)
    until(lambda: served.call(lambda: served.server._shared.budget.held) == 20 * (32 << 20))
    assert resident() - before < 64 << 20
    for client in clients:
        client.sock.close()


def test_one_byte_at_a_time(served: Served) -> None:
    export = served.export()
    with RawClient(served.path) as client:
        stream = struct.pack(">I", 3) + raw.opt(raw.STRUCTURED) + raw.go()
        stream += request(raw.WRITE, 0, 3, payload=b"abc") + request(raw.READ, 0, 3) + request(raw.DISC)
        for index in range(len(stream)):
            client.send(stream[index : index + 1])
        data = b""
        while piece := client.sock.recv(65536):
            data += piece
        assert data.endswith(b"abc")
    assert bytes(export.data[:3]) == b"abc"


@pytest.mark.parametrize("seed", range(4))
def test_random_cuts_through_mixed_requests(served: Served, seed: int) -> None:
    """Requests of every size around the buffer's bounds, cut anywhere, with slow ones between fast ones."""
    chance = random.Random(seed)
    export = served.export(8 << 20)
    model = bytearray(8 << 20)
    stream, expected = [], {}
    for cookie in range(40):
        length = chance.choice(
            [1, 28, 4096, 65_535, 70_000, 300_000, (2 << 20) - 30, 2 << 20, (2 << 20) + 5000, 3 << 20]
        )
        offset = chance.randrange(export.size - length)
        flags = chance.choice([0, 0, raw.FUA])
        content = chance.randbytes(length)
        model[offset : offset + length] = content
        stream.append(request(raw.WRITE, offset, length, flags, cookie=2 * cookie, payload=content))
        # Writes are not ordered among each other: wait for each before the next overlaps it.
        expected[2 * cookie] = (offset, length)
    with RawClient(served.path).enter() as client:
        for cookie, data in enumerate(stream):
            at = 0
            while at < len(data):
                cut = chance.choice([1, 27, 5000, 100_000, 1 << 20])
                client.send(data[at : at + cut])
                at += cut
            assert client.reply() == [("simple", 0, 2 * cookie, b"")]
    assert export.data == model


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mode=st.integers(0, 2), garbage=st.binary(max_size=200), command=st.integers(0, 9), flags=st.integers(0, 63))
def test_garbage_in_transmission_never_hurts_the_server(
    served: Served, mode: int, garbage: bytes, command: int, flags: int
) -> None:
    if "" not in served.server.exports:
        served.export()
    try:
        with RawClient(served.path).enter(mode=mode) as client:
            client.send(request(command, 0, len(garbage), flags, payload=garbage, extended=mode == 2))
            client.send(garbage)
            client.sock.shutdown(1)
            while client.sock.recv(65536):
                pass
    except (Gone, ConnectionResetError, OSError):
        pass
    alive(served)


def test_many_clients_come_and_go_at_once(served: Served) -> None:
    export = served.export()
    failures: list[BaseException] = []

    def visit(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(15):
                client = RawClient(served.path).enter(mode=chance.randrange(2))
                for _ in range(chance.randrange(5)):
                    client.send(request(chance.choice([raw.READ, raw.FLUSH, raw.CACHE]), 0, 512))
                if chance.random() < 0.5:
                    client.send(request(raw.DISC))
                client.sock.close()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    until(lambda: not export.clients)
    assert served.call(served.server.clients) == 0
    descriptors = len(os.listdir("/proc/self/fd"))
    time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
