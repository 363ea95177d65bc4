"""The event of migrations. Source: QEMU ``qapi/migration.json``."""

from __future__ import annotations

import enum

from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.qapi import QapiStruct


class MigrationStatus(enum.StrEnum):
    """QEMU's, as far as there are such phases here."""

    NONE = "none"
    SETUP = "setup"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"


BUSY = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.CANCELLING,
    }
)
"""A migration is under way."""


@event("MIGRATION")
class MigrationEvent(QapiStruct):
    """The status changed. Sent where the capability ``events`` is on."""

    status: MigrationStatus
