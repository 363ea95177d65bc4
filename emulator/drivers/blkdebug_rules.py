"""blkdebug's rules: as options, as a config file, and what follows when an event happens.

A rule waits for an event in a state (0: in any). When it happens, *set-state* rules change the state after all rules of the
event were looked at; the *inject-error* rules among them become the active ones, in place of those that were, and stay so until
an event with such rules happens again; breakpoints hold the request, once. Rules for ``none`` are active from the start. The
first state is 1.

Source: QEMU ``block/blkdebug.c`` (add_rule, process_rule), ``util/qemu-config.c`` (the config file); messages asked from
QEMU 10.0.2.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from livedisk.emulator.block.debug import Event
from livedisk.emulator.block.types import SECTOR
from livedisk.emulator.errors import BlockError

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET


class IoType(enum.StrEnum):
    """QEMU's BlkdebugIOType."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


_DEFAULT_TYPES: Final = frozenset(IoType) - {IoType.BLOCK_STATUS}


class InjectError(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's BlkdebugInjectErrorOptions. ``sector``: of 512 bytes; absent: every request, also those without a range."""

    event: Event
    state: int | Unset = UNSET
    iotype: IoType | Unset = UNSET
    errno: int | Unset = UNSET
    sector: int | Unset = UNSET
    once: bool | Unset = UNSET
    immediately: bool | Unset = UNSET


class SetState(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """QEMU's BlkdebugSetStateOptions."""

    event: Event
    state: int | Unset = UNSET
    new_state: int = msgspec.field(name="new_state")


class Error:
    """An inject-error rule: which requests fail, and with what. ``number`` 0: they do not, which hides later rules."""

    __slots__ = ("immediately", "number", "offset", "once", "state", "types")

    def __init__(self, given: InjectError) -> None:
        self.state = _given(given.state, 0)
        self.types = frozenset((given.iotype,)) if isinstance(given.iotype, IoType) else _DEFAULT_TYPES
        self.number = max(_given(given.errno, errno.EIO), 0)
        self.once = given.once is True
        self.immediately = given.immediately is True
        sector = _given(given.sector, -1)
        self.offset = -1 if sector == -1 else sector * SECTOR

    def meets(self, kind: IoType, offset: int, length: int) -> bool:
        """Whether a request of that kind over these bytes is concerned."""
        if kind not in self.types:
            return False
        return self.offset == -1 or (length > 0 and offset <= self.offset < offset + length)


def _given(value: int | Unset, default: int) -> int:
    return value if isinstance(value, int) else default


class Rules:
    """All rules of one node, the state, and the requests that breakpoints hold."""

    def __init__(self, errors: list[InjectError], states: list[SetState]) -> None:
        self.state = 1
        self.held: list[tuple[str, asyncio.Future[None]]] = []
        """Tag and what its request waits for, the newest first."""
        self._errors: dict[Event, list[Error]] = {}
        self._states: dict[Event, list[SetState]] = {}
        self._breakpoints: list[tuple[Event, str]] = []
        self._active: list[Error] = []
        for error in errors:
            self._errors.setdefault(error.event, []).append(Error(error))
        for state in states:
            self._states.setdefault(state.event, []).append(state)
        self._switch(Event.NONE)

    # -- events ------------------------------------------------------------------------------------------------------
    def _switch(self, event: Event) -> list[str]:
        """Change active rules and state; returns the tags of breakpoints that were hit, which are gone then."""
        now = self.state
        # Where two rules of one event set the state, QEMU ends with the first one given.
        for change in self._states.get(event, ()):
            if _given(change.state, 0) in (0, now):
                self.state = change.new_state
                break
        active = [rule for rule in self._errors.get(event, ()) if rule.state in (0, now)]
        if active:
            self._active = active
        hit = [tag for known, tag in self._breakpoints if known is event]
        self._breakpoints = [known for known in self._breakpoints if known[0] is not event]
        return hit

    async def event(self, event: Event) -> None:
        """It happens; returns when every breakpoint on it was resumed."""
        hit = self._switch(event)
        waits = []
        for tag in reversed(hit):
            waits.append(asyncio.get_running_loop().create_future())
            self.held.insert(0, (tag, waits[-1]))
            _say(f"Suspended request '{tag}'")
        for wait in waits:
            await wait

    def failing(self, kind: IoType, offset: int, length: int) -> Error | None:
        """The rule by which this request fails, or None. A rule for once is used up."""
        rule = next((one for one in self._active if one.meets(kind, offset, length)), None)
        if rule is None or not rule.number:
            return None
        if rule.once:
            self._active = [one for one in self._active if one is not rule]
            for rules in self._errors.values():
                if rule in rules:
                    rules.remove(rule)
        return rule

    # -- breakpoints -------------------------------------------------------------------------------------------------
    def set_breakpoint(self, event: str, tag: str) -> None:
        """Raises OSError(ENOENT) where there is no such event."""
        try:
            self._breakpoints.append((Event(event), tag))
        except ValueError:
            raise _no_such() from None

    def remove_breakpoint(self, tag: str) -> None:
        """Forget breakpoints of that tag and resume what they hold. Raises OSError(ENOENT)."""
        left = [known for known in self._breakpoints if known[1] != tag]
        found = len(left) != len(self._breakpoints) or self.is_suspended(tag)
        self._breakpoints = left
        while self.is_suspended(tag):
            self.resume(tag)
        if not found:
            raise _no_such()

    def resume(self, tag: str) -> None:
        """Let the newest request of that tag go on. Raises OSError(ENOENT)."""
        for position, (known, wait) in enumerate(self.held):
            if known == tag:
                del self.held[position]
                _say(f"Resuming request '{tag}'")
                wait.set_result(None)
                return
        raise _no_such()

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is held under that tag."""
        return any(known == tag for known, _ in self.held)


def _no_such() -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def _say(text: str) -> None:
    """On standard output, as QEMU's does: tests look for it there."""
    sys.stdout.write(f"blkdebug: {text}\n")
    sys.stdout.flush()


# -- the config file -----------------------------------------------------------------------------------------------------
_GROUP: Final = re.compile(r"\[([^]]{1,63})]")
_SETTING: Final = re.compile(r'\s*(\S{1,63})(?:\s*=\s*"([^"]{0,1023})")?')
_MEMBERS: Final = {
    "inject-error": ("event", "state", "iotype", "errno", "sector", "once", "immediately"),
    "set-state": ("event", "state", "new_state"),
}
_WORDS: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}
_NUMBER: Final = re.compile(r"\s*[+-]?(0[xX][0-9a-fA-F]+|\d+)\Z")


def read_config(path: str) -> tuple[list[InjectError], list[SetState]]:
    """The rules of a config file. Raises BlockError in QEMU's words."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise BlockError(f"Could not read blkdebug config file: {error.strerror}") from error
    errors: list[InjectError] = []
    states: list[SetState] = []
    for group, settings in _sections(text):
        event = settings.get("event")
        if event is None:
            raise BlockError("Missing event name for rule")
        state = _number(settings, "state")
        if group == "inject-error":
            errors.append(
                InjectError(
                    event=_event(event),
                    state=state,
                    iotype=_io_type(settings),
                    errno=_number(settings, "errno"),
                    sector=_number(settings, "sector"),
                    once=_boolean(settings, "once"),
                    immediately=_boolean(settings, "immediately"),
                )
            )
        else:
            states.append(
                SetState(event=_event(event), state=state, new_state=_given(_number(settings, "new_state"), 0))
            )
    return errors, states


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    group, settings = "", dict[str, str]()
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            if group:
                yield group, settings
            head = _GROUP.match(line)
            group, settings = head.group(1).split(' "')[0] if head else "", {}
            if group not in _MEMBERS:
                raise BlockError(f"There is no option group '{group}'")
            continue
        if not group:
            raise BlockError("no group defined")
        found = _SETTING.match(line)
        assert found is not None  # the line is not blank
        name, value = found.group(1), found.group(2) or ""
        if name not in _MEMBERS[group]:
            raise BlockError(f"Invalid parameter '{name}'")
        settings[name] = value
    if group:
        yield group, settings


def _event(name: str) -> Event:
    try:
        return Event(name)
    except ValueError:
        raise BlockError(f"invalid parameter value: {name}") from None


def _io_type(settings: dict[str, str]) -> IoType | Unset:
    if "iotype" not in settings:
        return UNSET
    try:
        return IoType(settings["iotype"])
    except ValueError:
        raise BlockError(f"invalid parameter value: {settings['iotype']}") from None


def _number(settings: dict[str, str], name: str) -> int | Unset:
    if name not in settings:
        return UNSET
    text = settings[name]
    if not _NUMBER.match(text):
        raise BlockError(f"Parameter '{name}' expects a number")
    text = text.strip()
    octal = re.fullmatch(r"[+-]?0[0-7]+", text)
    return int(text, 8) if octal else int(text, 16 if "x" in text.lower() else 10)


def _boolean(settings: dict[str, str], name: str) -> bool | Unset:
    if name not in settings:
        return UNSET
    if settings[name] not in _WORDS:
        raise BlockError(f"Parameter '{name}' expects 'on' or 'off'")
    return _WORDS[settings[name]]
