"""The server as a whole, over real sockets: listening, many exports and clients, removal, pausing, stopping."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import raw_nbd as raw
from kit.memory_export import MemoryExport
from kit.raw_nbd import RawClient, go, request
from livedisk.nbd.server import ExportInUse, NbdServer

from .conftest import Served

Serve = Callable[..., Served]


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for what happens in the server's thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("poll_max_ns", [0, 64_000])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("fast", [True, False])
def test_reads_and_writes_in_every_mode(serve: Serve, mode: int, fast: bool, poll_max_ns: int) -> None:
    served = serve(poll_max_ns=poll_max_ns)
    export = served.export(fast=fast)
    with RawClient(served.path).enter(mode=mode) as client:
        extended = mode == 2
        for offset, length in [(0, 512), (5, 4096), (100_000, 300_000), (1 << 19, 1 << 19)]:
            content = os.urandom(length)
            flags = raw.PAYLOAD if extended else 0
            client.send(request(raw.WRITE, offset, length, flags, payload=content, extended=extended))
            assert client.reply()[-1][2] == (7 if mode < 2 else 0)
            client.send(request(raw.READ, offset, length, extended=extended))
            reply = client.reply(length)
            if mode == 0:
                assert reply == [("simple", 0, 7, content)]
            else:
                assert b"".join(chunk[5][8:] for chunk in reply) == content
        assert next(name for name, _, _ in export.log) == ("try_write" if fast else "write")


def test_replies_come_out_of_order_and_the_fast_path_goes_on(served: Served) -> None:
    export = served.export()
    release = threading.Event()

    async def wait(operation: str, offset: int, length: int) -> None:
        while not release.is_set():
            await asyncio.sleep(0.001)

    export.hook = wait
    with RawClient(served.path).enter() as client:
        client.send(request(raw.FLUSH, cookie=1))
        for cookie in range(2, 50):
            client.send(request(raw.READ, 0, 16, cookie=cookie))
            assert client.reply(16)[0][2] == cookie
        release.set()
        assert client.reply() == [("simple", 0, 1, b"")]


def test_pipelined_from_the_first_byte_to_the_last(served: Served) -> None:
    export = served.export()
    export.fill(0, b"x" * 4096)
    with RawClient(served.path) as client:
        client.send(struct.pack(">I", 3), go(), request(raw.READ, 0, 4, cookie=1), request(raw.DISC))
        data = b""
        while piece := client.sock.recv(65536):
            data += piece
        assert data.endswith(b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01xxxx")


def test_disconnect_waits_for_requests_under_way(served: Served) -> None:
    export = served.export()
    gate = threading.Event()

    async def wait(*_: object) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.001)

    export.hook = wait
    with RawClient(served.path).enter() as client:
        client.send(request(raw.FLUSH, cookie=1), request(raw.DISC), b"garbage")
        client.sock.settimeout(0.1)
        assert not client.gone()
        client.sock.settimeout(5)
        gate.set()
        assert client.reply() == [("simple", 0, 1, b"")]
        assert client.gone()
    until(lambda: export.clients == [])


def test_exports_are_told_of_their_clients(serve: Serve) -> None:
    changes: list[tuple[str, int]] = []
    served = serve(on_clients_changed=lambda export, count: changes.append((export.name, count)))
    first, second = served.export(name="a"), served.export(name="b")
    with RawClient(served.path).enter(b"a"), RawClient(served.path).enter(b"a"):
        until(lambda: len(first.clients) == 2)
        with RawClient(served.path).enter(b"b"):
            until(lambda: len(second.clients) == 1)
            assert served.call(served.server.clients) == 3
            assert served.call(served.server.clients, first) == 2
    until(lambda: not first.clients and not second.clients)
    until(lambda: len(changes) == 6)
    assert sorted(changes) == [("a", 0), ("a", 1), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]


def test_names_must_be_new_and_short(served: Served) -> None:
    served.export(name="a")
    with pytest.raises(ValueError, match="NBD server already has export named 'a'"):
        served.export(name="a")
    with pytest.raises(ValueError, match="too long"):
        served.export(name="ä" * 2049)
    with pytest.raises(ValueError, match="description of export 'b' too long"):
        served.export(name="b", description="x" * 4097)


def test_safe_removal_is_refused_while_in_use(served: Served) -> None:
    export = served.export()
    with RawClient(served.path).enter() as client:
        with pytest.raises(ExportInUse) as refused:
            served.call(served.server.remove, "")
        assert refused.value.clients == 1
        client.send(request(raw.READ, 0, 4))
        assert client.reply(4)[0][:2] == ("simple", 0)
    until(lambda: not export.clients)
    served.call(served.server.remove, "")
    with RawClient(served.path).hello() as client:
        assert client.option(go())[-1][2] == b"export '' not present"
    with pytest.raises(KeyError):
        served.call(served.server.remove, "")


def test_hard_removal_disconnects_and_waits_for_requests_under_way(served: Served) -> None:
    export, other = served.export(), served.export(name="other")
    gate, done = threading.Event(), threading.Event()

    async def wait(*_: object) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.001)

    export.hook = wait
    with RawClient(served.path).enter() as client, RawClient(served.path).enter(b"other") as neighbour:
        client.send(request(raw.WRITE, 0, 4, raw.FUA, payload=b"abcd"))
        until(lambda: served.call(served.server.in_flight, export) == 1)

        def remove() -> None:
            served.run(served.server.remove_now(""))
            done.set()

        remover = threading.Thread(target=remove)
        remover.start()
        assert client.gone()
        assert not done.wait(0.1)
        gate.set()
        assert done.wait(5)
        remover.join()
        # The write was not cut short, its client was told gone afterwards, and nobody else noticed.
        assert export.data[:4] == b"abcd"
        assert export.clients == []
        neighbour.send(request(raw.READ, 0, 4))
        assert neighbour.reply(4)[0][1] == 0
    assert len(other.log) == 1


def test_paused_export_starts_nothing_and_loses_nothing(served: Served) -> None:
    export, other = served.export(), served.export(name="other")
    with RawClient(served.path).enter() as client, RawClient(served.path).enter(b"other") as neighbour:
        served.call(served.server.pause, export)
        served.call(served.server.pause, export)
        writes = [
            request(raw.WRITE, cookie * 64, 64, cookie=cookie, payload=bytes([cookie % 256]) * 64)
            for cookie in range(300)
        ]
        client.send(*writes, request(raw.FLUSH, cookie=1000))
        neighbour.send(request(raw.READ, 0, 4))
        assert neighbour.reply(4)[0][1] == 0
        served.call(served.server.resume, export)
        time.sleep(0.05)
        assert export.log == []
        served.call(served.server.resume, export)
        assert [client.reply()[0][2] for _ in range(301)] == [*range(300), 1000]
        assert export.data[64 * 299] == 299 % 256
    with pytest.raises(ValueError, match="not paused"):
        served.call(served.server.resume, other)


def test_a_client_that_connects_to_a_paused_export_waits(served: Served) -> None:
    export = served.export()
    served.call(served.server.pause, export)
    with RawClient(served.path).enter() as client:
        client.send(request(raw.READ, 0, 4))
        time.sleep(0.05)
        assert export.log == []
        served.call(served.server.resume, export)
        assert client.reply(4)[0][1] == 0


def test_a_resize_counts_from_the_next_request_on(served: Served) -> None:
    export = served.export(4096)
    with RawClient(served.path).enter() as client:
        client.send(request(raw.READ, 4096, 512))
        assert client.reply(512)[0][1] == errno.EINVAL
        export.data += bytes(4096)
        export.allocated += b"\0"
        client.send(request(raw.READ, 4096, 512))
        assert client.reply(512)[0][1] == 0


def test_closing_answers_what_is_under_way_and_refuses_the_rest(serve: Serve) -> None:
    served = serve()
    export = served.export()
    gate = threading.Event()

    async def wait(*_: object) -> None:
        while not gate.is_set():
            await asyncio.sleep(0.001)

    export.hook = wait
    with RawClient(served.path).enter() as client, RawClient(served.path).hello() as greeted:
        client.send(request(raw.FLUSH, cookie=1))
        until(lambda: served.call(served.server.in_flight, export) == 1)
        closer = threading.Thread(target=lambda: served.run(served.server.close()))
        closer.start()
        assert greeted.gone()
        gate.set()
        assert client.reply() == [("simple", 0, 1, b"")]
        assert client.gone()
        closer.join()
    assert not os.path.exists(served.path)
    assert export.clients == []


def test_requests_behind_the_stop_get_eshutdown(served: Served) -> None:
    export = served.export()
    with RawClient(served.path).enter(mode=1) as client:
        served.call(served.server.pause, export)
        client.send(request(raw.READ, 0, 512), request(raw.WRITE, 0, 4, payload=b"abcd"))
        time.sleep(0.05)

        def stop_then_serve() -> None:
            served.server._shared.stopping = True  # as `close` does before it disconnects
            served.server.resume(export)

        served.call(stop_then_serve)
        for _ in range(2):
            assert struct.unpack(">I", client.reply()[0][5][:4])[0] == errno.ESHUTDOWN
    assert export.log == []


def test_connections_beyond_the_limit_wait_their_turn(serve: Serve) -> None:
    served = serve(max_connections=2)
    served.export()
    first, second = RawClient(served.path).enter(), RawClient(served.path).enter()
    with RawClient(served.path) as third:
        third.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            third.take(1)
        third.sock.settimeout(5)
        first.sock.close()
        third.enter()
    second.sock.close()


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT", b"\0\0\0\3" + go() * 0 + raw.opt(raw.LIST)])
def test_negotiation_has_a_deadline(serve: Serve, sent: bytes) -> None:
    served = serve(handshake_seconds=0.2)
    served.export()
    with RawClient(served.path) as idle, RawClient(served.path).enter() as client:
        idle.send(sent)
        idle.take(18)
        if sent.endswith(raw.opt(raw.LIST)):
            idle.take(44)
        assert idle.gone()
        # Once an export is chosen, a client may take all the time it likes.
        time.sleep(0.25)
        client.send(request(raw.READ, 0, 4))
        assert client.reply(4)[0][1] == 0
    until(lambda: served.call(served.server.clients) == 0)


def test_stale_socket_files_are_replaced_and_live_ones_are_not(served: Served, short_path: Path) -> None:
    stale = short_path / "stale"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    assert served.call(served.server.listen_unix, str(stale)) == str(stale)
    with pytest.raises(OSError, match="another process listens there") as refused:
        served.call(served.server.listen_unix, str(stale))
    assert refused.value.errno == errno.EADDRINUSE
    (short_path / "file").write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        served.call(served.server.listen_unix, str(short_path / "file"))
    with pytest.raises(OSError, match="too long"):
        served.call(served.server.listen_unix, "/tmp/" + "x" * 110)
    with pytest.raises(OSError, match=r"Failed to bind socket to .*/no/such"):
        served.call(served.server.listen_unix, str(short_path / "no/such"))


def test_stopping_to_listen_leaves_another_servers_socket_alone(served: Served, short_path: Path) -> None:
    os.unlink(served.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(served.path)
        served.call(served.server.stop_listening)
        assert os.path.exists(served.path)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "localhost"])
def test_tcp(served: Served, host: str) -> None:
    served.export()
    addresses = served.run(served.server.listen_tcp(host, 0))
    assert len({port for _, port in addresses}) == 1
    reach = {"127.0.0.1": ["127.0.0.1"], "::1": ["::1"], "::": ["::1", "127.0.0.1"], "localhost": ["127.0.0.1"]}
    for address in reach[host]:
        with RawClient((address, addresses[0][1])).enter() as client:
            client.send(request(raw.WRITE, 0, 300_000, payload=b"y" * 300_000), request(raw.READ, 0, 300_000))
            assert client.reply()[0][1] == 0
            assert client.reply(300_000)[0][3] == b"y" * 300_000


def test_tcp_port_in_use(served: Served) -> None:
    ((_, port),) = served.run(served.server.listen_tcp("127.0.0.1", 0))
    with pytest.raises(OSError, match=f"Failed to bind socket to 127.0.0.1:{port}: Address already in use"):
        served.run(served.server.listen_tcp("127.0.0.1", port))


def test_inherited_descriptor(served: Served, short_path: Path) -> None:
    served.export()
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(short_path / "inherited"))
    sock.listen()
    served.call(served.server.listen_fd, sock.detach())
    with RawClient(str(short_path / "inherited")).enter():
        pass
    with socket.socket(socket.AF_UNIX) as quiet, pytest.raises(OSError, match="not a listening socket"):
        served.call(served.server.listen_fd, quiet.fileno())
    with (short_path / "file").open("w") as file, pytest.raises(OSError):
        served.call(served.server.listen_fd, file.fileno())


def test_idle_server_sleeps(served: Served) -> None:
    served.export()
    with RawClient(served.path).enter() as client:
        for _ in range(200):
            client.send(request(raw.READ, 0, 512))
            client.reply(512)
        time.sleep(0.05)
        native = served._thread.native_id
        before = cpu_ticks(native)
        time.sleep(0.5)
        assert cpu_ticks(native) - before <= 3


def cpu_ticks(thread: int | None) -> int:
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_the_loop_gets_its_turns_while_clients_keep_it_busy(served: Served) -> None:
    served.export()
    stop = threading.Event()

    def hammer() -> None:
        with RawClient(served.path).enter() as client:
            while not stop.is_set():
                client.send(request(raw.READ, 0, 512) * 8)
                for _ in range(8):
                    client.reply(512)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:

        async def timers() -> float:
            worst = 0.0
            for _ in range(50):
                began = time.monotonic()
                await asyncio.sleep(0.002)
                worst = max(worst, time.monotonic() - began)
            return worst

        assert served.run(timers()) < 0.5
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_server_wants_a_running_loop() -> None:
    with pytest.raises(RuntimeError):
        NbdServer()


def test_two_servers_do_not_share_exports(serve: Serve) -> None:
    first, second = serve(), serve()
    first.export(name="a")
    second.call(second.server.add, MemoryExport(512, "b"))
    with RawClient(first.path).hello() as client:
        assert client.option(go(b"b"))[-1][2] == b"export 'b' not present"
