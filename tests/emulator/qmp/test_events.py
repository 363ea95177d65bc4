"""Events: their form and their rate limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from livedisk.emulator.qmp import events
from livedisk.emulator.qmp.events import EventHub, event
from livedisk.emulator.qmp.qapi import QapiStruct


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Events of this test only."""
    monkeypatch.setattr(events, "EVENTS", {})
    monkeypatch.setattr(events, "_BY_CLASS", {})

    @event("PLAIN")
    class Plain(QapiStruct):
        pass

    @event("LIMITED", rate=0.1, key="qom-path")
    class Limited(QapiStruct):
        qom_path: str
        count: int

    return {"plain": Plain, "limited": Limited}


def collect(known: dict[str, Any], script: Any) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        hub, got = EventHub(), []
        hub.attach(got.append)
        await script(hub, got)
        return got

    return asyncio.run(main())


def test_an_event_without_data_has_no_data(known: dict[str, Any]) -> None:
    async def script(hub: EventHub, got: list[Any]) -> None:
        hub.emit(known["plain"]())

    (message,) = collect(known, script)
    assert set(message) == {"timestamp", "event"}


def test_a_limited_event_goes_out_at_once_and_the_last_of_the_rest_later(known: dict[str, Any]) -> None:
    async def script(hub: EventHub, got: list[Any]) -> None:
        for count in range(5):
            hub.emit(known["limited"](qom_path="/a", count=count))
        hub.emit(known["limited"](qom_path="/b", count=9))
        assert [message["data"]["count"] for message in got] == [0, 9]
        await asyncio.sleep(0.15)
        assert [message["data"]["count"] for message in got] == [0, 9, 4]
        # The limit goes on after the delayed one.
        hub.emit(known["limited"](qom_path="/a", count=5))
        assert len(got) == 3
        await asyncio.sleep(0.25)
        assert len(got) == 4
        hub.emit(known["limited"](qom_path="/a", count=6))

    assert [message["data"]["count"] for message in collect(known, script)] == [0, 9, 4, 5, 6]


def test_what_waits_is_sent_at_the_end(known: dict[str, Any]) -> None:
    async def script(hub: EventHub, got: list[Any]) -> None:
        hub.emit(known["limited"](qom_path="/a", count=1))
        hub.emit(known["limited"](qom_path="/a", count=2))
        hub.close()

    assert [message["data"]["count"] for message in collect(known, script)] == [1, 2]


def test_a_name_is_taken_once(known: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="PLAIN"):
        event("PLAIN")(known["limited"])


def test_a_sink_may_leave_while_events_are_sent(known: dict[str, Any]) -> None:
    async def script(hub: EventHub, got: list[Any]) -> None:
        def once(message: dict[str, Any]) -> None:
            hub.detach(once)

        hub.attach(once)
        hub.emit(known["plain"]())
        hub.emit(known["plain"]())

    assert len(collect(known, script)) == 2
