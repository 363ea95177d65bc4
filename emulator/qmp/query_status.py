"""query-status, stop, cont: whether the guest's I/O goes on. query-uuid.

Source: QEMU ``qapi/run-state.json``, ``qapi/misc.json``, ``monitor/qmp-cmds.c``.
"""

from __future__ import annotations

import msgspec

from livedisk.emulator.device.runstate import State
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.registry import command


class StatusInfo(QapiStruct):
    """``running``: the guest's requests are served."""

    running: bool
    status: State


@command("query-status", allow_preconfig=True)
async def query_status(ctx: Context) -> StatusInfo:
    """The run state."""
    run_state = ctx.daemon.run_state
    return StatusInfo(running=run_state.running, status=run_state.state)


@command("stop")
async def stop(ctx: Context) -> None:
    """Hold the guest's I/O. On return none is in flight and everything is flushed.

    Before a migration has come in there is nothing to hold: it only notes that the guest is not to run afterwards.
    """
    run_state = ctx.daemon.run_state
    if run_state.state is State.INMIGRATE:
        run_state.start_after_migration = False
        return
    await run_state.stop()


@command("cont")
async def cont(ctx: Context) -> None:
    """Let the guest's I/O go on; requests that an error stopped are tried again."""
    ctx.daemon.run_state.cont()


class UuidInfo(QapiStruct):
    """The guest's UUID, all zeroes where ``-uuid`` gave none."""

    uuid: str = msgspec.field(name="UUID")


@command("query-uuid", allow_preconfig=True)
async def query_uuid(ctx: Context) -> UuidInfo:
    """The guest's UUID."""
    return UuidInfo(uuid=ctx.daemon.uuid)
