"""The way to a connected socket, where it leads nowhere. Real servers: ``tests/emulator/drivers/nbd``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from livedisk.emulator.block.sockets import AnyAddress, ConnectFailed, FdAddress, InetAddress, UnixAddress, connect


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (FdAddress(str="foo"), "Unable to parse FD number foo"),
        (FdAddress(str="987"), "File descriptor '987' is not a socket"),
        (FdAddress(str="9" * 20), f"Unable to parse FD number {'9' * 20}"),
        (UnixAddress(path="x" * 109), f"UNIX socket path '{'x' * 109}' is too long"),
        (UnixAddress(path="x" * 108, abstract=True), f"UNIX socket path '{'x' * 108}' is too long"),
        (InetAddress(host="::", port="1", ipv4=False, ipv6=False), "Cannot disable IPv4 and IPv6 at same time"),
    ],
)
def test_addresses_that_are_none(address: AnyAddress, message: str) -> None:
    with pytest.raises(ConnectFailed) as caught:
        asyncio.run(connect(address))
    assert caught.value.strerror == message


def test_a_descriptor_that_is_no_socket_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(ConnectFailed, match=f"File descriptor '{descriptor}' is not a socket"):
                asyncio.run(connect(FdAddress(str=str(descriptor))))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(descriptor)
