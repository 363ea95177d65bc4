"""query-uuid. (What else tells of the guest stands with the device: ``device_commands``.)

Source: QEMU ``qapi/machine.json``.
"""

from __future__ import annotations

import msgspec

from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import QapiStruct
from livedisk.emulator.qmp.registry import command


class UuidInfo(QapiStruct):
    """The guest's UUID, all zeroes where ``-uuid`` gave none."""

    uuid: str = msgspec.field(name="UUID")


@command("query-uuid", allow_preconfig=True)
async def query_uuid(ctx: Context) -> UuidInfo:
    """The guest's UUID."""
    return UuidInfo(uuid=ctx.daemon.uuid)
