"""The source's side of a hand-over. See the package's docstring for the conversation and where it can be taken back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final

from livedisk.emulator.block.descriptors import take_socket
from livedisk.emulator.block.sockets import FdAddress, InetAddress, UnixAddress, shown
from livedisk.emulator.device.runstate import State
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.exports.node_export import NodeExport
from livedisk.emulator.exports.options import RemoveMode
from livedisk.jobs.commands import jobs_of
from livedisk.jobs.job import failure_text
from livedisk.jobs.migration import state
from livedisk.jobs.migration.events import MigrationStatus
from livedisk.jobs.migration.migration import TLS_SECONDS, Address, Migration, Progress, now
from livedisk.jobs.migration.parameters import MigrationCapability
from livedisk.jobs.migration.wire import (
    VERSION,
    Activated,
    Channel,
    Go,
    Hello,
    MigrationError,
    Running,
    Switch,
    Welcome,
)
from livedisk.jobs.mirror import MirrorJob
from livedisk.jobs.states import JobType, Status
from livedisk.nbd.tls import reason_of

log = logging.getLogger(__name__)

_ANSWER: Final = 30.0
"""Seconds that the destination has for an answer, while the guest is held or about to be."""
_CONFIRM: Final = 5.0
"""Seconds to wait for the word that the destination runs; nothing depends on it any more."""
_S = MigrationStatus


class Outgoing:
    """One attempt. ``mirrors``: ids of jobs that end with the hand-over; ``ends``: ids of the destination's exports that they
    fill; ``exports``: ids of ours that the destination goes on with."""

    def __init__(
        self,
        migration: Migration,
        address: Address,
        mirrors: Sequence[str],
        ends: Sequence[str],
        exports: Sequence[str],
    ) -> None:
        self._migration = migration
        self._daemon = migration.daemon
        self._address = address
        self._progress: Progress = migration.outgoing
        self._ends = list(ends)
        self._exports = list(exports)
        self._mirrors = [self._mirror(name) for name in mirrors]
        self._told = state.exports(self._daemon, exports)
        self._channel: Channel | None = None
        self._paused: list[NodeExport] = []
        self._held_since = 0.0
        self._before: State | None = None
        self._passed = take_socket(address.str) if isinstance(address, FdAddress) else None

    def _mirror(self, name: str) -> MirrorJob:
        job = jobs_of(self._daemon).find(name)
        if not isinstance(job, MirrorJob) or job.kind is not JobType.MIRROR:
            raise MigrationError(f"Job '{name}' is no mirror that could end with the migration")
        if not job.ready:
            raise MigrationError(f"Job '{name}' is not ready: wait for BLOCK_JOB_READY before the guest is handed over")
        return job

    async def run(self) -> None:
        """The whole hand-over. Ends in completed, failed or cancelled; raises nothing but CancelledError at the daemon's end."""
        migration, progress = self._migration, self._progress
        try:
            await self._to_the_point_of_no_return()
        except asyncio.CancelledError:
            await self._give_in(_S.CANCELLED, "")
        except (MigrationError, LiveDiskError, OSError) as error:
            await self._give_in(_S.FAILED, str(error))
        except Exception as error:
            log.exception("migration")
            await self._give_in(_S.FAILED, f"internal error: {error}")
        else:
            assert self._channel is not None
            self._daemon.run_state.end_migration(State.POSTMIGRATE)
            migration.gone = True
            await self._send_go(self._channel)
            progress.downtime = now() - self._held_since
            progress.ended = now()
            migration.move(progress, _S.COMPLETED)
            await self._leave_it()

    async def _to_the_point_of_no_return(self) -> None:
        migration, progress = self._migration, self._progress
        channel = await self._connect()
        async with channel.within(_ANSWER):
            hello = Hello(version=VERSION, disks=state.disks(self._daemon), exports=self._told)
            await channel.send(hello)
            await channel.expect(Welcome)
        progress.set_up = now()
        migration.move(progress, _S.ACTIVE)
        # What can be done before the guest is held is done before.
        for job in self._mirrors:
            await job.flush_target()
        await self._hold()
        self._check_mirrors()
        if migration.on(MigrationCapability.PAUSE_BEFORE_SWITCHOVER):
            await self._wait_for_leave(channel)
        migration.move(progress, _S.DEVICE)
        await self._end_mirrors()
        async with channel.within(_ANSWER):
            for message in state.device_states(self._daemon):
                await channel.send(message)
            if migration.on(MigrationCapability.DIRTY_BITMAPS):
                nodes = list(dict.fromkeys([*(disk.node for disk in hello.disks), *(one.node for one in self._told)]))
                for piece in state.bitmaps(self._daemon, nodes):
                    await channel.send(piece)
            await channel.send(Switch(self._ends))
            await channel.expect(Activated)

    async def _connect(self) -> Channel:
        address, name = self._address, "destination"
        context, hostname = self._migration.client_context(address)
        more: dict[str, Any] = (
            {}
            if context is None
            else {"ssl": context, "server_hostname": hostname or "", "ssl_handshake_timeout": TLS_SECONDS}
        )
        try:
            if isinstance(address, InetAddress):
                streams = await asyncio.open_connection(address.host or "localhost", int(address.port), **more)
            elif self._passed is not None:
                streams = await asyncio.open_connection(sock=self._passed, **more)
            else:
                assert isinstance(address, UnixAddress)
                streams = await asyncio.open_unix_connection(address.path, **more)
        except OSError as error:
            raise MigrationError(f"Failed to connect to '{shown(address)}': {reason_of(error)}") from None
        self._channel = channel = Channel(*streams, name)
        await channel.greet()
        return channel

    async def _hold(self) -> None:
        """Hold the guest, and the clients of exports of nodes, who are guests in all but name."""
        self._before = self._daemon.run_state.state
        self._held_since = now()
        server = self._daemon.exports.server
        for ident in self._exports:
            export = self._daemon.exports.find(ident)
            if isinstance(export, NodeExport) and server is not None:
                server.pause(export)
                self._paused.append(export)
        await self._daemon.run_state.hold_for_migration()
        # Of a device's export more requests may be under way: they wait in the device, for whom it is held.
        while server is not None and any(server.in_flight(export) for export in self._paused):
            await asyncio.sleep(0.001)

    def _check_mirrors(self) -> None:
        """Raise MigrationError for a mirror that ended before the guest was held: its target lacks what came after."""
        for job in self._mirrors:
            waiting = job.status in (Status.WAITING, Status.PENDING) and not job.group.settling
            if not job.ready and not waiting:
                raise MigrationError(f"mirror '{job.id}' ended before the guest was held")

    async def _wait_for_leave(self, channel: Channel) -> None:
        """pre-switchover: whoever drives the migration does what is his, and says migrate-continue."""
        self._migration.may_continue.clear()
        self._migration.move(self._progress, _S.PRE_SWITCHOVER)
        leave = asyncio.ensure_future(self._migration.may_continue.wait())
        word = asyncio.ensure_future(channel.receive())
        try:
            await asyncio.wait((leave, word), return_when=asyncio.FIRST_COMPLETED)
            if word.done():
                word.result()
                raise MigrationError("the destination spoke out of turn")
        finally:
            for waiter in (leave, word):
                waiter.cancel()
            await asyncio.gather(leave, word, return_exceptions=True)

    async def _end_mirrors(self) -> None:
        """Let every mirror copy what is left and end; all have to."""
        for job in self._mirrors:
            job.request_cancel(force=False)
        for job in self._mirrors:
            await job.over()
            if job.status is Status.PENDING:  # it was to wait for job-finalize: this is it
                await job.user_finalize()
            if job.error is not None or job.force_cancelled:
                reason = failure_text(job.error) if job.error is not None else "it was cancelled"
                raise MigrationError(f"mirror '{job.id}' failed: {reason}")
            if job.status not in (Status.CONCLUDED, Status.NULL):
                raise MigrationError(f"mirror '{job.id}' is still being finalized by somebody else")

    async def _send_go(self, channel: Channel) -> None:
        """The destination may run. Should the word be lost, neither runs, and ``error`` says so."""
        running = self._before is State.RUNNING
        try:
            async with channel.within(_CONFIRM):
                await channel.send(Go(running))
                await channel.expect(Running)
        except MigrationError as error:
            channel.abort()  # should Go still be on its way, it is not to arrive when the guest was taken back
            self._progress.error = (
                f"the guest was given up, but the destination did not confirm that it runs ({error}): see query-status there; "
                "if it does not run, and waits no more, 'cont' here takes the guest back"
            )
            log.warning("migration: %s", self._progress.error)

    async def _leave_it(self) -> None:
        """The destination has the guest: send its clients away, and let others have the images."""
        assert self._channel is not None
        await self._channel.close()
        for ident in self._exports:
            with contextlib.suppress(LiveDiskError):
                await self._daemon.exports.delete(ident, RemoveMode.HARD)
        await self._migration.inactive.give_up()

    async def _give_in(self, status: MigrationStatus, reason: str) -> None:
        """Go on as before."""
        if self._channel is not None:
            self._channel.abort()
        if self._before is not None:
            server = self._daemon.exports.server
            for export in self._paused:
                if server is not None:
                    with contextlib.suppress(ValueError):  # it was removed meanwhile
                        server.resume(export)
            if self._daemon.run_state.state is State.FINISH_MIGRATE:
                self._daemon.run_state.end_migration(self._before)
        self._progress.error = reason
        self._progress.ended = now()
        if reason:
            log.warning("migration failed: %s", reason)
        self._migration.move(self._progress, status)
