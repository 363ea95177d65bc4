"""QMP events: each a Struct, registered by name; one hub sends them to every monitor that negotiated.

    @event("BLOCK_IO_ERROR", rate=1.0, key="qom-path")
    class BlockIoError(QapiStruct): ...

    hub.emit(BlockIoError(...))

Rate limits are QEMU's (``monitor/monitor.c``, monitor_qapi_event_conf): at most one event a second of a kind that a
guest can cause at will. The first goes out at once; of those that follow within the second, the last goes out when it
ends. ``key`` names a member: the limit is kept for each of its values apart. The limit is the emulator's, not a
monitor's, so all monitors see the same events.

Timestamps are wall-clock, taken when the event is emitted, not when it leaves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

S = TypeVar("S", bound=type[msgspec.Struct])


class EventKind(msgspec.Struct, frozen=True):
    """An event's name, its data, and its limit."""

    name: str
    data: type[msgspec.Struct]
    rate: float = 0.0
    """Seconds that two events (of one key) are at least apart; 0: no limit."""
    key: str | None = None
    """The wire member whose values are limited apart from each other."""
    features: tuple[str, ...] = ()


EVENTS: dict[str, EventKind] = {}
"""Every known event by name, for introspection."""

_BY_CLASS: dict[type[msgspec.Struct], EventKind] = {}


def event(name: str, *, rate: float = 0.0, key: str | None = None, features: tuple[str, ...] = ()) -> Callable[[S], S]:
    """Class decorator that registers a Struct as the data of an event."""

    def register(cls: S) -> S:
        if name in EVENTS:
            raise ValueError(f"event {name!r} is registered twice")
        EVENTS[name] = _BY_CLASS[cls] = EventKind(name, cls, rate, key, features)
        return cls

    return register


class _Throttle(msgspec.Struct):
    """A limit in force: the timer that ends it, and the event that waits for that."""

    timer: asyncio.TimerHandle
    pending: dict[str, Any] | None = None


Sink = Callable[[dict[str, Any]], None]


class EventHub:
    """Takes typed events, limits their rate, hands them to its sinks (the monitors)."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._throttles: dict[tuple[str, Any], _Throttle] = {}

    def attach(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        self._sinks.remove(sink)

    def emit(self, data: msgspec.Struct) -> None:
        """Send an event. Needs a running event loop where the event has a limit. Raises KeyError for an unregistered
        class."""
        kind = _BY_CLASS[type(data)]
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
            "event": kind.name,
        }
        members = msgspec.to_builtins(data)
        if kind.data.__struct_fields__:
            message["data"] = members
        if not kind.rate:
            self._send(message)
            return
        key = (kind.name, members.get(kind.key) if kind.key else None)
        throttle = self._throttles.get(key)
        if throttle is not None:
            throttle.pending = message
            return
        self._send(message)
        self._throttles[key] = _Throttle(self._arm(kind, key))

    def close(self) -> None:
        """Send what waits, drop all timers."""
        for throttle in self._throttles.values():
            throttle.timer.cancel()
            if throttle.pending is not None:
                self._send(throttle.pending)
        self._throttles.clear()

    def _arm(self, kind: EventKind, key: tuple[str, Any]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(kind.rate, self._expire, kind, key)

    def _expire(self, kind: EventKind, key: tuple[str, Any]) -> None:
        throttle = self._throttles[key]
        if throttle.pending is None:
            del self._throttles[key]
            return
        self._send(throttle.pending)
        throttle.pending = None
        throttle.timer = self._arm(kind, key)

    def _send(self, message: dict[str, Any]) -> None:
        for sink in tuple(self._sinks):
            sink(message)


def known_events() -> Iterator[EventKind]:
    """All registered events in order of name."""
    return iter(EVENTS[name] for name in sorted(EVENTS))
