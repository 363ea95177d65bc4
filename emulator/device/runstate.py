"""The run state: whether guests' requests are served, and why not.

    prelaunch ──cont──> running ──stop──> paused ──cont──> running
                           └──failed request, policy "stop"──> io-error ──cont──> running
    inmigrate ──cont──> inmigrate, running as soon as the migration has come in     any ──quit──> shutdown

`RunState` holds every *guest* (an object that can hold and release its requests: a device) in step with the state:
a guest that is added while nothing runs is held at once. `stop` returns when no request of any guest is in flight and
everything is flushed; requests that come meanwhile wait in the guests until `cont`.

Exports of nodes, and jobs, are not guests: they go on. Source: QEMU ``system/cpus.c`` (do_vm_stop, vm_prepare_start),
``system/runstate.c``, ``qapi/run-state.json``, ``monitor/qmp-cmds.c`` (qmp_stop, qmp_cont).
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec

from livedisk.emulator.device.events import Resume, Stop
from livedisk.emulator.errors import LiveDiskError

log = logging.getLogger(__name__)


class State(enum.StrEnum):
    """QEMU's RunState, as far as a disk without a machine knows its values."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"


S = State
MOVES: Final[dict[State, frozenset[State]]] = {
    S.PRELAUNCH: frozenset({S.RUNNING, S.FINISH_MIGRATE, S.INMIGRATE, S.SHUTDOWN}),
    S.INMIGRATE: frozenset({S.RUNNING, S.PAUSED, S.IO_ERROR, S.SHUTDOWN, S.FINISH_MIGRATE, S.PRELAUNCH, S.POSTMIGRATE}),
    S.RUNNING: frozenset({S.PAUSED, S.IO_ERROR, S.FINISH_MIGRATE, S.SHUTDOWN}),
    S.PAUSED: frozenset({S.RUNNING, S.FINISH_MIGRATE, S.POSTMIGRATE, S.PRELAUNCH, S.SHUTDOWN}),
    S.IO_ERROR: frozenset({S.RUNNING, S.FINISH_MIGRATE, S.PRELAUNCH, S.SHUTDOWN, S.PAUSED}),
    S.FINISH_MIGRATE: frozenset({S.RUNNING, S.PAUSED, S.POSTMIGRATE, S.PRELAUNCH, S.IO_ERROR, S.SHUTDOWN}),
    S.POSTMIGRATE: frozenset({S.RUNNING, S.FINISH_MIGRATE, S.PRELAUNCH, S.SHUTDOWN}),
    S.SHUTDOWN: frozenset({S.PAUSED, S.FINISH_MIGRATE, S.PRELAUNCH, S.POSTMIGRATE}),
}
"""Legal moves, as in QEMU's table; staying where one is is always legal."""


class Guest(Protocol):
    """Somebody whose requests the run state holds. `hold` and `release` come in turn, synchronously."""

    def hold(self) -> None:
        """Start no request any more until `release`."""

    def release(self) -> None:
        """Serve again, first what waited."""

    async def idle(self) -> None:
        """Wait until no request is in flight."""


class RunState:
    """The state, and the guests that follow it.

    ``emit`` sends an event; ``flush`` puts every node's acknowledged writes on stable storage. ``on_change`` is called
    with every new state.
    """

    def __init__(
        self,
        emit: Callable[[msgspec.Struct], None],
        flush: Callable[[], Awaitable[None]],
        state: State = State.PRELAUNCH,
    ) -> None:
        self._emit = emit
        self._flush = flush
        self._state = state
        self._guests: list[Guest] = []
        self._settling: asyncio.Task[None] | None = None
        self.start_after_migration = True
        """Whether the guest runs once an incoming migration is complete (QEMU's autostart: false after ``-S``)."""
        self.before_run: list[Callable[[], Awaitable[None]]] = []
        """Awaited by `resume`; each may raise LiveDiskError, and then nothing runs."""
        self.on_change: list[Callable[[State], None]] = []

    # -- looking -----------------------------------------------------------------------------------------------------
    @property
    def state(self) -> State:
        """The state now."""
        return self._state

    @property
    def running(self) -> bool:
        """Whether guests' requests are served."""
        return self._state is State.RUNNING

    # -- guests ------------------------------------------------------------------------------------------------------
    def add(self, guest: Guest) -> None:
        """Let ``guest`` follow the state from now on."""
        self._guests.append(guest)
        if not self.running:
            guest.hold()

    def remove(self, guest: Guest) -> None:
        """Let it go; a held guest is released."""
        self._guests.remove(guest)
        if not self.running:
            guest.release()

    # -- moving ------------------------------------------------------------------------------------------------------
    def move(self, state: State) -> None:
        """Go to ``state``: hold or release the guests, tell the watchers. Emits nothing, waits for nothing.

        Raises LiveDiskError for a move that is not in `MOVES`.
        """
        if state is self._state:
            return
        if state not in MOVES[self._state]:
            raise LiveDiskError(f"invalid runstate transition: '{self._state}' -> '{state}'")
        was_running, self._state = self.running, state
        if was_running != self.running:
            for guest in self._guests:
                if was_running:
                    guest.hold()
                else:
                    guest.release()
        for callback in list(self.on_change):
            callback(state)

    async def stop(self, state: State = State.PAUSED) -> None:
        """Hold all guests; on return nothing of theirs is in flight and all is flushed. In a state that does not run it
        only flushes; in ``inmigrate`` it notes that the guest is not to run when the migration is complete."""
        if self._state is State.INMIGRATE:
            self.start_after_migration = False
            return
        if self.running:
            self.move(state)
            self._emit(Stop())
        await self._settle()

    async def hold_for_migration(self) -> None:
        """Hold all guests in ``finish-migrate``; on return nothing of theirs is in flight. Nothing is flushed: the time counts,
        and what the guest goes on with is not this process's storage."""
        was_running = self.running
        self.move(State.FINISH_MIGRATE)
        if was_running:
            self._emit(Stop())
        for guest in list(self._guests):
            await guest.idle()

    def end_migration(self, state: State) -> None:
        """Leave ``finish-migrate`` or ``inmigrate`` for ``state``; RESUME goes out first where guests run again."""
        if state is State.RUNNING:
            self._emit(Resume())
        self.move(state)

    def stop_soon(self, state: State) -> None:
        """Hold all guests at once and finish as `stop` does in the background: for a request that failed and cannot
        wait for itself."""
        if not self.running:
            return
        self.move(state)
        # QEMU's main loop sends STOP after the request's BLOCK_IO_ERROR, which the caller emits when this returns.
        self._settling = asyncio.get_running_loop().create_task(self._announce_stop())

    async def _announce_stop(self) -> None:
        self._emit(Stop())
        await self._settle()

    async def _settle(self) -> None:
        for guest in list(self._guests):
            await guest.idle()
        try:
            await self._flush()
        except OSError as error:
            # QEMU's stop does the same: the guest is stopped all the same, and each write that was not flushed is
            # still unacknowledged as stable.
            log.warning("flushing after stop failed: %s", error)

    def cont(self) -> None:
        """Release all guests. In ``inmigrate`` it only notes that the guest is to run once the migration is complete."""
        if self.running:
            return
        if self._state is State.INMIGRATE:
            self.start_after_migration = True
            return
        if self._state is State.FINISH_MIGRATE:
            raise LiveDiskError("Migration is not finalized yet")
        if self._state is State.SHUTDOWN:
            raise LiveDiskError("Resetting the Virtual Machine is required")
        # RESUME goes out first, as with QEMU: whoever hears it must not have seen new requests before.
        self._emit(Resume())
        self.move(State.RUNNING)

    async def resume(self) -> None:
        """`cont`, after what has to be done before guests may run (``before_run``)."""
        if not self.running and self._state not in (State.INMIGRATE, State.FINISH_MIGRATE, State.SHUTDOWN):
            for step in list(self.before_run):
                await step()
        self.cont()

    def start(self) -> None:
        """Begin to run after the command line was processed (without ``-S``, without ``-incoming``)."""
        self.cont()
