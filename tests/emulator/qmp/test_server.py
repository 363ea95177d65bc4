"""Character devices: addresses, roles, one client at a time, bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kit.places import free_port, short_folder
from kit.process import Process
from kit.qmp_host import Host, serve
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp import server, yank
from livedisk.emulator.qmp.chardev import SocketChardev, parse_chardev, parse_compat, parse_monitor
from livedisk.emulator.qmp.monitor import Port
from livedisk.emulator.qmp.server import SocketDevice, open_chardev

TESTS = Path(__file__).resolve().parents[2]


class Echo:
    """A frontend that sends back what it gets and keeps a log."""

    def __init__(self) -> None:
        self.port: Port | None = None
        self.log: list[str] = []

    def opened(self, port: Port) -> None:
        self.port = port
        self.log.append("opened")
        port.write(b"hello\n")

    def received(self, data: bytes) -> None:
        assert self.port is not None
        self.port.write(data)

    def closed(self) -> None:
        self.log.append("closed")


def run(test: Callable[[Path], Awaitable[None]]) -> None:
    async def main(folder: Path) -> None:
        await asyncio.wait_for(test(folder), 30)

    with short_folder() as folder:
        asyncio.run(main(folder))


async def opened(text: str) -> tuple[SocketDevice, Echo]:
    device, frontend = await open_chardev(parse_compat(text, "c")), Echo()
    assert isinstance(device, SocketDevice)
    device.attach(frontend)
    return device, frontend


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> bytes:
    writer.write(text + b"\n")
    return await asyncio.wait_for(reader.readline(), 10)


def test_one_client_at_a_time_the_next_after_it() -> None:
    async def test(folder: Path) -> None:
        device, frontend = await opened(f"unix:{folder}/s,server=on,wait=off")
        first = await asyncio.open_unix_connection(f"{folder}/s")
        second = await asyncio.open_unix_connection(f"{folder}/s")
        assert await first[0].readline() == b"hello\n"
        assert await talk(*first, b"x") == b"x\n"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second[0].readline(), 0.1)
        first[1].close()
        assert await asyncio.wait_for(second[0].readline(), 10) == b"hello\n"
        assert frontend.log == ["opened", "closed", "opened"]
        second[1].close()
        await device.close()
        assert not (folder / "s").exists()

    run(test)


def test_what_a_client_wrote_before_leaving_is_served() -> None:
    async def test(folder: Path) -> None:
        device, _ = await opened(f"unix:{folder}/s,server=on,wait=off")
        reader, writer = await asyncio.open_unix_connection(f"{folder}/s")
        writer.write(b"last words\n")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b"hello\nlast words\n"
        writer.close()
        await device.close()

    run(test)


def test_tcp() -> None:
    async def test(folder: Path) -> None:
        device, _ = await opened("tcp:127.0.0.1:0,server=on,wait=off")
        kind, host, port = device.address.split(":")
        assert (kind, host) == ("tcp", "127.0.0.1")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.readline() == b"hello\n"
        assert await talk(reader, writer, b"x") == b"x\n"
        writer.close()
        await device.close()

    run(test)


def test_localhost_listens_in_both_families() -> None:
    async def test(folder: Path) -> None:
        port = free_port()
        device, _ = await opened(f"tcp:localhost:{port},server=on,wait=off")
        for host in {address[4][0] for address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}:
            reader, writer = await asyncio.open_connection(host, port)
            assert await asyncio.wait_for(reader.readline(), 10) == b"hello\n"
            writer.close()
        await device.close()

    run(test)


def test_a_listening_descriptor() -> None:
    async def test(folder: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/s")
        listener.listen()
        device = await open_chardev(parse_chardev(f"socket,id=c,fd={os.dup(listener.fileno())},server=on,wait=off"))
        listener.close()
        device.attach(Echo())
        reader, writer = await asyncio.open_unix_connection(f"{folder}/s")
        assert await reader.readline() == b"hello\n"
        writer.close()
        await device.close()

    run(test)


def test_a_connected_descriptor() -> None:
    async def test(folder: Path) -> None:
        ours, theirs = socket.socketpair()
        device = await open_chardev(parse_chardev(f"socket,id=c,fd={ours.detach()}"))
        device.attach(Echo())
        reader, writer = await asyncio.open_connection(sock=theirs)
        assert await reader.readline() == b"hello\n"
        writer.close()
        await device.close()

    run(test)


def test_a_client_connects_again_after_a_while() -> None:
    async def test(folder: Path) -> None:
        served = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"hello\n"
            served.set()
            writer.close()

        options = parse_chardev(f"socket,id=c,path={folder}/s,reconnect-ms=20")
        device, frontend = await open_chardev(options), Echo()
        device.attach(frontend)
        await asyncio.sleep(0.05)
        listener = await asyncio.start_unix_server(accept, f"{folder}/s")
        for _ in range(2):
            await asyncio.wait_for(served.wait(), 10)
            served.clear()
        assert frontend.log[:3] == ["opened", "closed", "opened"]
        await device.close()
        listener.close()

    run(test)


def test_wait_holds_start_up_and_says_so() -> None:
    async def test(folder: Path) -> None:
        said: list[str] = []
        opening = asyncio.ensure_future(open_chardev(parse_compat(f"unix:{folder}/s,server=on", "c"), said.append))
        await asyncio.sleep(0.1)
        assert not opening.done()
        assert said == [f"QEMU waiting for connection on: disconnected:unix:{folder}/s,server=on"]
        reader, writer = await asyncio.open_unix_connection(f"{folder}/s")
        device = await asyncio.wait_for(opening, 10)
        writer.write(b"early\n")
        await asyncio.sleep(0.05)
        device.attach(Echo())
        assert await reader.readline() == b"hello\n"
        assert await reader.readline() == b"early\n"
        writer.close()
        await device.close()

    run(test)


def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_LIMIT", 1 << 20)

    async def test(folder: Path) -> None:
        device, frontend = await opened(f"unix:{folder}/s,server=on,wait=off")
        reader, writer = await asyncio.open_unix_connection(f"{folder}/s", limit=1024)
        await reader.readline()
        assert frontend.port is not None
        for _ in range(64):
            frontend.port.write(b"x" * (64 << 10))
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert frontend.log == ["opened", "closed"]
        # The next client is served.
        again = await asyncio.open_unix_connection(f"{folder}/s")
        assert await asyncio.wait_for(again[0].readline(), 10) == b"hello\n"
        writer.close()
        again[1].close()
        await device.close()

    run(test)


def test_a_client_that_never_reads_is_not_read_from() -> None:
    async def test(folder: Path) -> None:
        device, _ = await opened(f"unix:{folder}/s,server=on,wait=off")
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{folder}/s")
        client.setblocking(False)
        sent = 0
        for _ in range(2000):
            try:
                sent += client.send(b"y" * (64 << 10))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        # What the sockets' buffers and the transport's high-water mark hold, no more.
        assert sent < 4 << 20
        client.close()
        await device.close()

    run(test)


def test_a_stale_socket_is_replaced_but_no_other_file() -> None:
    async def test(folder: Path) -> None:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(f"{folder}/s")
        stale.close()
        device, _ = await opened(f"unix:{folder}/s,server=on,wait=off")
        await device.close()
        (folder / "file").write_text("precious")
        with pytest.raises(LiveDiskError, match=r"Failed to bind socket to .*/file: Address already in use"):
            await opened(f"unix:{folder}/file,server=on,wait=off")
        assert (folder / "file").read_text() == "precious"

    run(test)


def test_yank_knows_open_devices() -> None:
    async def test(folder: Path) -> None:
        device, frontend = await opened(f"unix:{folder}/s,server=on,wait=off")
        reader, writer = await asyncio.open_unix_connection(f"{folder}/s")
        await reader.readline()
        assert ("chardev", "c") in yank.instances()
        yank.yank([("chardev", "c")])
        assert await asyncio.wait_for(reader.read(), 10) == b""
        assert frontend.log == ["opened", "closed"]
        writer.close()
        await device.close()
        assert ("chardev", "c") not in yank.instances()

    run(test)


# -- what is refused; the texts are qemu-storage-daemon's ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "chardev: no id specified"),
        ("socket", "chardev: no id specified"),
        ("foo,id=a", "'foo' is not a valid char driver name"),
        ("socket,id=a", "Unable to parse FD number "),
        ("socket,id=a,port=1", "Unable to parse FD number "),
        ("socket,id=a,fd=foo", "Unable to parse FD number foo"),
        ("socket,id=a,host=localhost", "chardev: socket: no port given"),
        ("socket,id=a,path=/x,fd=3", "None or one of 'path', 'fd' or 'host' option required."),
        ("socket,id=1a,path=/x", "Parameter 'id' expects an identifier"),
        ("socket,id=a,path=/x,server=on,wait=maybe", "Parameter 'wait' expects 'on' or 'off'"),
        ("socket,id=a,path=/x,zork=1", "Invalid parameter 'zork'"),
        ("socket,id=a,path=/x,ser", "Invalid parameter 'ser'"),
        ("socket,id=a,path=/x,wait=on", "'wait' option is incompatible with socket in client connect mode"),
        (
            "socket,id=a,path=/x,server=on,reconnect=1",
            "'reconnect' option is incompatible with socket in server listen mode",
        ),
        ("socket,id=a,path=/x,reconnect=x", "Parameter 'reconnect' expects a number"),
    ],
)
def test_options_refused(text: str, message: str) -> None:
    with pytest.raises(LiveDiskError) as caught:
        parse_chardev(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "'foo' is not a valid char driver"),
        ("fd:3", "'fd:3' is not a valid char driver"),
        ("tcp:127.0.0.1", "parse error: tcp:127.0.0.1"),
        ("unix:/x,server=on,zork=1", "Invalid parameter 'zork'"),
        ("unix:", "Unable to parse FD number "),
    ],
)
def test_compat_refused(text: str, message: str) -> None:
    with pytest.raises(LiveDiskError) as caught:
        parse_compat(text, "c")
    assert str(caught.value) == message


def test_compat_addresses() -> None:
    assert parse_compat("tcp::4444,server", "c") == SocketChardev(id="c", host="", port="4444", server=True)
    assert parse_compat("tcp:[::1]:4444", "c") == SocketChardev(id="c", host="::1", port="4444")
    assert parse_compat("unix:a,,b,server=on,wait=off", "c") == SocketChardev(
        id="c", path="a,b", server=True, wait=False
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unix:@/nope", "Failed to connect to '@/nope': No such file or directory"),
        ("tcp:127.0.0.1:1", "Failed to connect to '127.0.0.1:1': Connection refused"),
        ("unix:@/no/s,server=on,wait=off", "Failed to bind socket to @/no/s: No such file or directory"),
        ("unix:/" + "a" * 120 + ",server=on,wait=off", f"UNIX socket path '/{'a' * 120}' is too long"),
        (
            "tcp:127.0.0.1:foo,server=on,wait=off",
            "address resolution failed for 127.0.0.1:foo: Servname not supported for ai_socktype",
        ),
    ],
)
def test_addresses_refused(text: str, message: str) -> None:
    async def test(folder: Path) -> None:
        with pytest.raises(LiveDiskError) as caught:
            await opened(text.replace("@", str(folder)))
        assert str(caught.value) == message.replace("@", str(folder))
        assert yank.instances() == []

    run(test)


def test_descriptors_refused() -> None:
    async def test(folder: Path) -> None:
        read, write = os.pipe()
        try:
            with pytest.raises(LiveDiskError, match=f"File descriptor '{read}' is not a socket"):
                await open_chardev(parse_chardev(f"socket,id=a,fd={read},server=on,wait=off"))
            with pytest.raises(LiveDiskError, match="File descriptor '9999' is not a socket"):
                await open_chardev(parse_chardev("socket,id=a,fd=9999"))
        finally:
            os.close(read)
            os.close(write)
        one, other = socket.socketpair()
        with pytest.raises(LiveDiskError, match="Failed to listen on fd socket: Invalid argument"):
            await open_chardev(parse_chardev(f"socket,id=a,fd={one.fileno()},server=on,wait=off"))
        one.close()
        other.close()

    run(test)


@pytest.mark.parametrize(
    ("text", "older", "message"),
    [
        ("c,mode=foo", True, "Parameter 'mode' does not accept value 'foo'"),
        ("c,mode=foo", False, "Parameter 'mode' does not accept value 'foo'"),
        ("c,pretty=maybe", False, "Parameter 'pretty' expects 'on' or 'off'"),
        ("c,zork=1", True, "Invalid parameter 'zork'"),
        ("c,zork=1", False, "Parameter 'zork' is unexpected"),
        ("mode=control", True, "Parameter 'chardev' is missing"),
        ("mode=control", False, "Parameter 'chardev' is missing"),
        ("c,mode=readline,pretty=on", True, "'pretty' is not compatible with HMP monitors"),
        ("c,server", False, "Expected '=' after parameter 'server'"),
    ],
)
def test_monitor_options_refused(text: str, older: bool, message: str) -> None:
    with pytest.raises(LiveDiskError) as caught:
        parse_monitor(text, "control", older_syntax=older)
    assert str(caught.value) == message


def test_monitor_options() -> None:
    assert parse_monitor("c", "control", older_syntax=False).mode == "control"
    assert parse_monitor('{"chardev":"c","pretty":true}', "control", older_syntax=False).pretty is True
    assert parse_monitor("chardev=c,mode=readline", "control", older_syntax=True).mode == "readline"


# -- as a process -------------------------------------------------------------------------------------------------------


def host(*monitors: str) -> list[str]:
    return [sys.executable, "-m", "kit.qmp_host", *monitors]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}


def test_stdio_runs_all_that_came_before_the_end_of_the_input() -> None:
    script = b'{"execute":"qmp_capabilities"}{"execute":"query-name","id":1}\n{"execute":"quit","id":2}\n'
    done = subprocess.run(host("qmp stdio"), input=script, capture_output=True, env=ENVIRONMENT, timeout=30, check=True)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply.get("id") for reply in replies if "event" not in reply] == [None, None, 1, 2]


def test_stdio_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "script").write_bytes(b'{"execute":"qmp_capabilities"}{"execute":"quit","id":2}')
    with (tmp_path / "script").open("rb") as script:
        done = subprocess.run(
            host("qmp stdio"), stdin=script, capture_output=True, env=ENVIRONMENT, timeout=30, check=True
        )
    assert json.loads(done.stdout.splitlines()[-1]) == {"return": {}, "id": 2}


def test_the_end_of_stdin_ends_the_monitor_not_the_emulator() -> None:
    with short_folder() as folder:
        words = host("qmp stdio", f"qmp unix:{folder}/s,server=on,wait=off")
        with Process(words, log=folder / "log", environment=ENVIRONMENT) as process:
            process.wait_for_socket(folder / "s")
            assert process.running


def test_a_reader_of_stdout_that_is_behind_does_not_hold_up_the_others() -> None:
    with short_folder() as folder:
        words = host("qmp stdio", f"qmp unix:{folder}/s,server=on,wait=off")
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
        assert child.stdin is not None
        try:
            child.stdin.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-qmp-schema"}' * 30)
            child.stdin.flush()
            connected = wait_connect(folder / "s")
            connected.settimeout(10)
            connected.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-name","id":"through"}')
            got = b""
            while b"through" not in got:
                got += connected.recv(65536)
            connected.close()
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()


def wait_connect(path: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    for _ in range(200):
        try:
            connected.connect(str(path))
        except OSError:
            signal.sigtimedwait([], 0.02)
        else:
            return connected
    raise AssertionError(f"nobody listens at {path}")


def test_several_monitors_of_both_kinds() -> None:
    async def test(folder: Path) -> None:
        started = asyncio.Event()
        monitors = [
            f"{kind} unix:{folder}/{name},server=on,wait=off"
            for kind, name in [("qmp", "a"), ("qmp", "b"), ("hmp", "h")]
        ]
        serving = asyncio.ensure_future(serve(monitors, Host("guest"), started))
        await started.wait()
        qmps = [await asyncio.open_unix_connection(f"{folder}/{name}") for name in "ab"]
        human = await asyncio.open_unix_connection(f"{folder}/h")
        for reader, writer in qmps:
            await reader.readline()
            writer.write(b'{"execute":"qmp_capabilities"}')
            assert json.loads(await reader.readline()) == {"return": {}}
        assert await human[0].readuntil(b"(qemu) ")
        human[1].write(b"info name\r")
        assert (await human[0].readuntil(b"\r\n(qemu) ")).endswith(b"\r\nguest\r\n(qemu) ")
        human[1].write(b"quit\r")
        for reader, writer in qmps:
            message: dict[str, Any] = json.loads(await asyncio.wait_for(reader.readline(), 10))
            assert message["event"] == "SHUTDOWN"
            writer.close()
        human[1].close()
        await serving

    run(test)
