"""The QMP monitor without a socket: negotiation, ids, order, out-of-band execution, several monitors, events."""

from __future__ import annotations

import asyncio
import logging
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kit.qmp_host import Host, RecordingPort
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp import control
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.monitor import QUEUE_LIMIT, Dispatcher, QmpMonitor
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.registry import Registry
from livedisk.emulator.qmp.version import LIVEDISK_VERSION

NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'
WITH_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}\n'


class Note(QapiStruct):
    text: str


class Bench:
    """Monitors over a registry of test commands. ``gate`` holds ``wait``; ``log`` keeps what ran."""

    def __init__(self) -> None:
        self.host = Host("guest")
        self.dispatcher = Dispatcher()
        self.registry = Registry()
        self.gate = asyncio.Event()
        self.log: list[str] = []
        for name in ("qmp_capabilities", "query-name", "query-version"):
            self.registry.add(control.registry.get(name))
        self._commands()

    def _commands(self) -> None:
        command = self.registry.command

        @command("wait")
        async def wait(ctx: Context, args: Note) -> None:
            self.log.append(f"start {args.text}")
            await self.gate.wait()
            self.log.append(f"end {args.text}")

        @command("note", allow_oob=True)
        async def note(ctx: Context, args: Note) -> str:
            self.log.append(args.text)
            return args.text

        @command("bad-oob", allow_oob=True)
        async def bad_oob(ctx: Context) -> None:
            await asyncio.sleep(0)

        @command("refuse")
        async def refuse(ctx: Context) -> None:
            raise BlockError("no such luck")

        @command("os-error")
        async def os_error(ctx: Context) -> None:
            raise FileNotFoundError(2, "No such file or directory", "/x")

        @command("bug")
        async def bug(ctx: Context) -> None:
            raise ZeroDivisionError("oops")

        @command("silent", success_response=False)
        async def silent(ctx: Context) -> None:
            self.log.append("silent")

        self.registry.command("note-typed")(note_typed)

    def monitor(self, first: bytes = NEGOTIATE) -> tuple[QmpMonitor, RecordingPort]:
        monitor = QmpMonitor(self.host, self.registry, self.dispatcher)  # type: ignore[arg-type]
        port = RecordingPort()
        monitor.opened(port)
        if first:
            monitor.received(first)
        return monitor, port


class Empty(QapiStruct):
    pass


async def note_typed(ctx: Context, args: Empty) -> list[Empty]:
    return [args]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Bench()), 20)

    asyncio.run(main())


def error(desc: str, kind: str = "GenericError", **more: Any) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": desc}, **more}


def test_greeting_and_negotiation() -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor(b"")
        greeting = port.take()[0]["QMP"]
        assert greeting["capabilities"] == ["oob"]
        assert greeting["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}
        assert greeting["version"]["package"].startswith("livedisk ")
        monitor.received(b'{"execute":"query-name"}{"execute":"no-such"}')
        monitor.received(NEGOTIATE + NEGOTIATE + b'{"execute":"query-name","id":[1]}')
        await settle()
        expecting = error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        assert port.take() == [
            expecting,
            expecting,
            {"return": {}},
            error("Capabilities negotiation is already complete, command ignored", "CommandNotFound"),
            {"return": {"name": "guest"}, "id": [1]},
        ]

    run(test)


def test_each_connection_negotiates_anew() -> None:
    async def test(bench: Bench) -> None:
        monitor, _ = bench.monitor(WITH_OOB)
        await settle()
        monitor.closed()
        port = RecordingPort()
        monitor.opened(port)
        monitor.received(b'{"exec-oob":"note","arguments":{"text":"x"}}{"execute":"query-name"}')
        await settle()
        assert port.take()[1:] == [
            error("QMP input member 'exec-oob' is unexpected"),
            error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"),
        ]

    run(test)


def test_a_half_sent_request_does_not_reach_the_next_connection() -> None:
    async def test(bench: Bench) -> None:
        monitor, _ = bench.monitor()
        await settle()
        monitor.received(b'{"execute": "no')
        monitor.closed()
        port = RecordingPort()
        monitor.opened(port)
        monitor.received(NEGOTIATE)
        await settle()
        assert port.take()[1:] == [{"return": {}}]

    run(test)


@pytest.mark.parametrize(
    ("request_text", "reply"),
    [
        (b"[]", error("QMP input must be a JSON object")),
        (b"{}", error("QMP input lacks member 'execute'")),
        (b'{"id":5}', error("QMP input lacks member 'execute'", id=5)),
        (b'{"execute":1,"id":null}', error("QMP input member 'execute' must be a string", id=None)),
        (b'{"a":1,"execute":"note","id":7}', error("QMP input member 'a' is unexpected", id=7)),
        (b'{"execute":"note","arguments":[]}', error("QMP input member 'arguments' must be an object")),
        (b'{"execute":"no-such"}', error("The command no-such has not been found", "CommandNotFound")),
        (b'{"execute":"note"}', error("Parameter 'text' is missing")),
        (b'{"execute":"query-name","arguments":{"x":1}}', error("Parameter 'x' is unexpected")),
        (b'{"execute":"refuse","id":1}', error("no such luck", id=1)),
        (b'{"execute":"os-error"}', error("/x: No such file or directory")),
        (b'{"execute":"note-typed"}', {"return": [{}]}),
        (b'{"exec-oob":"query-name","id":1}', error("The command query-name does not support OOB", id=1)),
        (b'{"exec-oob":"no-such"}', error("The command no-such has not been found", "CommandNotFound")),
        (b'{"exec-oob":1}', error("QMP input member 'exec-oob' must be a string")),
        (b'{"exec-oob":"note","execute":"note"}', error("QMP input member 'execute' clashes with 'exec-oob'")),
        (b'{"exec-oob":"note","arguments":{"text":"x"}}', {"return": "x"}),
        (b"{'execute'", None),
    ],
)
def test_replies(request_text: bytes, reply: dict[str, Any] | None) -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor(WITH_OOB)
        await settle()
        port.take()
        monitor.received(request_text + b"\n")
        await settle()
        assert port.take() == ([] if reply is None else [reply])

    run(test)


def test_a_bug_in_a_command_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor()
        await settle()
        port.take()
        with caplog.at_level(logging.CRITICAL, "livedisk"):
            monitor.received(b'{"execute":"bug"}{"execute":"query-name"}')
            await settle()
        assert port.take() == [error("Internal error: ZeroDivisionError: oops"), {"return": {"name": "guest"}}]

    run(test)


def test_no_success_response() -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor()
        await settle()
        port.take()
        monitor.received(b'{"execute":"silent"}{"execute":"silent","arguments":{"x":1}}')
        await settle()
        assert bench.log == ["silent"]
        assert port.take() == [error("Parameter 'x' is unexpected")]

    run(test)


def wait_request(text: str) -> bytes:
    return b'{"execute":"wait","arguments":{"text":"%s"},"id":"%s"}' % (text.encode(), text.encode())


def test_without_oob_nothing_more_is_read_while_a_command_runs() -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor()
        await settle()
        port.take()
        monitor.received(wait_request("a") + wait_request("b"))
        await settle()
        assert not port.reading
        assert bench.log == ["start a"]
        bench.gate.set()
        await settle()
        assert port.reading
        assert bench.log == ["start a", "end a", "start b", "end b"]
        assert port.take() == [{"return": {}, "id": "a"}, {"return": {}, "id": "b"}]

    run(test)


def test_out_of_band_overtakes() -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor(WITH_OOB)
        await settle()
        port.take()
        monitor.received(wait_request("a") + wait_request("b"))
        monitor.received(b'{"exec-oob":"note","arguments":{"text":"now"},"id":"o"}')
        await settle()
        assert bench.log == ["now", "start a"]
        assert port.take() == [{"return": "now", "id": "o"}]
        bench.gate.set()
        await settle()
        assert [reply["id"] for reply in port.take()] == ["a", "b"]

    run(test)


def test_the_queue_is_bounded() -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor(WITH_OOB)
        await settle()
        port.take()
        for index in range(QUEUE_LIMIT):
            assert port.reading
            monitor.received(wait_request(str(index)))
        # One more than runs: with the first running, the limit is reached by the ninth.
        await settle()
        assert port.reading
        monitor.received(wait_request("last"))
        assert not port.reading
        monitor.received(b'{"exec-oob":"note","arguments":{"text":"late"}}')
        await settle()
        assert "late" not in bench.log
        bench.gate.set()
        await settle()
        assert port.reading
        assert bench.log.index("late") < bench.log.index("start 2")
        assert len(port.take()) == QUEUE_LIMIT + 2

    run(test)


def test_an_out_of_band_command_that_waits_is_a_bug_that_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        monitor, port = bench.monitor(WITH_OOB)
        await settle()
        port.take()
        with caplog.at_level(logging.CRITICAL, "livedisk"):
            monitor.received(b'{"exec-oob":"bad-oob"}')
        (reply,) = port.take()
        assert "may run out of band, but waits" in reply["error"]["desc"]

    run(test)


def test_monitors_take_turns_and_commands_never_overlap() -> None:
    async def test(bench: Bench) -> None:
        one, port_one = bench.monitor(WITH_OOB)
        two, port_two = bench.monitor(WITH_OOB)
        await settle()
        one.received(b"".join(wait_request(f"a{index}") for index in range(3)))
        two.received(b"".join(wait_request(f"b{index}") for index in range(3)))
        bench.gate.set()
        await settle()
        starts = [entry.removeprefix("start ") for entry in bench.log if entry.startswith("start")]
        assert starts == ["a0", "b0", "a1", "b1", "a2", "b2"]
        assert all(bench.log[at].split()[1] == bench.log[at + 1].split()[1] for at in range(0, 12, 2))
        assert [reply["id"] for reply in port_one.take()[2:]] == ["a0", "a1", "a2"]
        assert [reply["id"] for reply in port_two.take()[2:]] == ["b0", "b1", "b2"]

    run(test)


def test_a_client_that_went_is_not_answered_nor_its_queue_run() -> None:
    async def test(bench: Bench) -> None:
        monitor, _ = bench.monitor(WITH_OOB)
        await settle()
        monitor.received(wait_request("a") + wait_request("b"))
        await settle()
        monitor.closed()
        port = RecordingPort()
        monitor.opened(port)
        monitor.received(NEGOTIATE)
        await settle()
        bench.gate.set()
        await settle()
        assert bench.log == ["start a", "end a"]
        assert port.take()[1:] == [{"return": {}}]

    run(test)


def test_events_reach_all_that_negotiated() -> None:
    async def test(bench: Bench) -> None:
        _, negotiated = bench.monitor()
        _, silent = bench.monitor(b"")
        gone, departed = bench.monitor()
        await settle()
        gone.closed()
        for port in (negotiated, silent, departed):
            port.take()
        bench.host.quit("host-qmp-quit")
        (message,) = negotiated.take()
        assert message["event"] == "SHUTDOWN"
        assert message["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert 0 <= message["timestamp"]["microseconds"] < 1_000_000
        assert silent.take() == departed.take() == []

    run(test)


def test_the_version_told_is_the_packages() -> None:
    with (Path(__file__).resolve().parents[3] / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == LIVEDISK_VERSION
