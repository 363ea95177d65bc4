"""Capabilities and parameters of migrations: which there are, and what may be set.

All of QEMU's capabilities are listed, so that clients that look for one find that it is off; switching one on that has no
meaning without a machine's memory is an error that names it. Source: QEMU ``qapi/migration.json``,
``migration/options.c``; messages asked from QEMU 10.0.2.
"""

from __future__ import annotations

import enum
from typing import Final

from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.jobs.migration.wire import MigrationError


class MigrationCapability(enum.StrEnum):
    """QEMU's."""

    XBZRLE = "xbzrle"
    RDMA_PIN_ALL = "rdma-pin-all"
    AUTO_CONVERGE = "auto-converge"
    ZERO_BLOCKS = "zero-blocks"
    EVENTS = "events"
    POSTCOPY_RAM = "postcopy-ram"
    X_COLO = "x-colo"
    RELEASE_RAM = "release-ram"
    RETURN_PATH = "return-path"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    MULTIFD = "multifd"
    DIRTY_BITMAPS = "dirty-bitmaps"
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    X_IGNORE_SHARED = "x-ignore-shared"
    VALIDATE_UUID = "validate-uuid"
    BACKGROUND_SNAPSHOT = "background-snapshot"
    ZERO_COPY_SEND = "zero-copy-send"
    POSTCOPY_PREEMPT = "postcopy-preempt"
    SWITCHOVER_ACK = "switchover-ack"
    DIRTY_LIMIT = "dirty-limit"
    MAPPED_RAM = "mapped-ram"


SUPPORTED: Final = frozenset(
    {
        MigrationCapability.EVENTS,
        MigrationCapability.PAUSE_BEFORE_SWITCHOVER,
        MigrationCapability.DIRTY_BITMAPS,
    }
)


class MigrationCapabilityStatus(QapiStruct):
    """One capability, and whether it is on."""

    capability: MigrationCapability
    state: bool


def check_capability(wanted: MigrationCapabilityStatus) -> None:
    """Raise MigrationError for one that cannot be switched on."""
    if wanted.state and wanted.capability not in SUPPORTED:
        raise MigrationError(f"Capability '{wanted.capability}' is not supported: there is no memory to migrate")


class SetParameters(QapiStruct):
    """migrate-set-parameters' arguments; see `Parameters`."""

    tls_creds: str | UnsetType = UNSET
    tls_hostname: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET


class Parameters(QapiStruct):
    """query-migrate-parameters' answer (QEMU's MigrationParameters): of QEMU's, those that have a meaning without memory to
    copy. ``tls-creds`` "": no TLS."""

    tls_creds: str
    tls_hostname: str
    tls_authz: str


def apply(parameters: Parameters, given: SetParameters) -> None:
    """Set what is given."""
    for name in Parameters.__struct_fields__:
        value = getattr(given, name)
        if value is not UNSET:
            setattr(parameters, name, value)
