"""Where the NBD server listens: every kind of address, and what a wrong one answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kit import libnbd
from kit.memory_disk import Bench
from kit.places import free_port
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.exports.listen import ListenError
from livedisk.emulator.exports.options import (
    FdAddress,
    InetAddress,
    NbdExportOptions,
    NbdServerOptions,
    UnixAddress,
    VsockAddress,
)

Address = InetAddress | UnixAddress | FdAddress | VsockAddress


def listening(address: Address, look: Callable[[Bench], Awaitable[Any]]) -> Any:
    """What ``look`` returns while the server listens at ``address``."""

    async def main() -> Any:
        bench = Bench()
        await bench.disk()
        try:
            await bench.exports.start_server(NbdServerOptions(addr=address))
            await bench.exports.add(NbdExportOptions(id="e", node_name="disk", name=""))
            return await look(bench)
        finally:
            await bench.close()

    return asyncio.run(asyncio.wait_for(main(), 30))


async def size_at(uri: str) -> Any:
    return await asyncio.to_thread(libnbd.script, uri, "result = h.get_size()")


@pytest.mark.parametrize(
    ("host", "options", "reached"),
    [
        ("127.0.0.1", {}, ["127.0.0.1"]),
        ("::1", {}, ["[::1]"]),
        ("", {}, ["127.0.0.1", "[::1]"]),
        ("::", {}, ["127.0.0.1", "[::1]"]),
        ("0.0.0.0", {"numeric": True}, ["127.0.0.1"]),
        ("", {"ipv4": True}, ["127.0.0.1"]),
        ("", {"ipv6": True}, ["[::1]"]),
        ("::", {"ipv6": True, "ipv4": False, "keep_alive": True}, ["[::1]"]),
    ],
)
def test_tcp_addresses_are_reached_where_they_should(host: str, options: dict[str, Any], reached: list[str]) -> None:
    port = free_port("::1")

    async def look(bench: Bench) -> list[str]:
        found = []
        for place in ("127.0.0.1", "[::1]"):
            try:
                probe = await asyncio.to_thread(socket.create_connection, (place.strip("[]"), port), 5)
            except OSError:
                continue
            probe.close()
            assert await size_at(f"nbd://{place}:{port}/") == 1 << 20
            found.append(place)
        return found

    assert listening(InetAddress(host=host, port=str(port), **options), look) == reached


def test_a_range_of_ports_takes_the_first_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match="Failed to find an available port: Address already in use"):
            listening(InetAddress(host="127.0.0.1", port=str(port)), _size_of_nothing)

        async def look(bench: Bench) -> bool:
            assert bench.exports.server is not None
            return True

        assert listening(InetAddress(host="127.0.0.1", port=str(port), to=min(port + 50, 65535)), look)


async def _size_of_nothing(bench: Bench) -> None:
    raise AssertionError("it listens")


def test_an_abstract_name(short_path: Path) -> None:
    name = f"livedisk-test{short_path.name}"

    async def look(bench: Bench) -> Any:
        code = f"""
            import socket
            link = socket.socket(socket.AF_UNIX); link.connect("\\0{name}")
            h.connect_socket(link.detach())
            result = h.get_size()
            """
        return await asyncio.to_thread(libnbd.script, None, code)

    assert listening(UnixAddress(path=name, abstract=True), look) == 1 << 20


def test_an_inherited_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        number = listener.detach()

    async def look(bench: Bench) -> Any:
        return await size_at(f"nbd://127.0.0.1:{port}/")

    assert listening(FdAddress(str=str(number)), look) == 1 << 20


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (FdAddress(str="foo"), "Unable to parse FD number foo"),
        (FdAddress(str="987"), "File descriptor '987' is not a socket"),
        (FdAddress(str="9" * 20), f"Unable to parse FD number {'9' * 20}"),
        (VsockAddress(cid="1", port="2"), "socket family AF_VSOCK unsupported"),
        (InetAddress(host="127.0.0.1", port="5", to=4), "port range '5-4' is empty: 'to' is below 'port'"),
        (UnixAddress(path="x" * 120, abstract=True), f"UNIX socket path '{'x' * 120}' is too long"),
    ],
)
def test_refused_addresses(address: Address, message: str) -> None:
    with pytest.raises(LiveDiskError) as caught:
        listening(address, _size_of_nothing)
    assert str(caught.value) == message


def test_a_file_that_is_no_socket_is_left_alone(short_path: Path) -> None:
    # QEMU removes whatever stands there.
    precious = short_path / "precious"
    precious.write_text("data")
    with pytest.raises(ListenError, match=r"Failed to bind socket to .*precious"):
        listening(UnixAddress(path=str(precious)), _size_of_nothing)
    assert precious.read_text() == "data"
