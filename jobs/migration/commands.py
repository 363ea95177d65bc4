"""migrate, migrate-incoming, and what belongs to them. Source: QEMU ``qapi/migration.json``; messages asked from QEMU 10.0.2."""

from __future__ import annotations

import asyncio
import enum
from typing import Annotated

from livedisk.emulator.block.sockets import Fd, FdAddress, Inet, InetAddress, Unix, UnixAddress, VsockAddress
from livedisk.emulator.device.runstate import State
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import UNSET, Meta, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.migration.events import MigrationStatus
from livedisk.jobs.migration.incoming import Incoming
from livedisk.jobs.migration.migration import Address, Migration, Progress, migration_of, now, parse_uri
from livedisk.jobs.migration.outgoing import Outgoing
from livedisk.jobs.migration.parameters import (
    MigrationCapability,
    MigrationCapabilityStatus,
    Parameters,
    SetParameters,
    apply,
    check_capability,
)
from livedisk.jobs.migration.wire import MigrationError

_S = MigrationStatus


class HandOver(QapiStruct):
    """What goes with the guest; ours alone. ``mirrors``: jobs, ready, that end when the guest is held; ``ends``: exports of
    the destination that end before it takes the disks over; ``exports``: ours that the destination goes on with, under the same
    ids and names."""

    mirrors: list[str] = []
    ends: list[str] = []
    exports: list[str] = []


class MigrationAddressType(enum.StrEnum):
    """How the stream is carried: by sockets alone."""

    SOCKET = "socket"


class MigrationAddress(QapiStruct, kw_only=True):
    """A socket's address; its ``type`` says which of QEMU's. All have their ``transport`` in common."""


class InetChannel(Inet, MigrationAddress, tag="inet", tag_field="type", kw_only=True):
    """TCP."""

    transport: MigrationAddressType


class UnixChannel(Unix, MigrationAddress, tag="unix", tag_field="type", kw_only=True):
    """A path."""

    transport: MigrationAddressType


class FdChannel(Fd, MigrationAddress, tag="fd", tag_field="type", kw_only=True):
    """A connected socket, by the name that getfd gave it."""

    transport: MigrationAddressType


class MigrationChannelType(enum.StrEnum):
    """There is one stream."""

    MAIN = "main"


class MigrationChannel(QapiStruct, kw_only=True):
    """Where a stream goes, or comes from."""

    channel_type: MigrationChannelType
    addr: InetChannel | UnixChannel | FdChannel


class MigrateOptions(QapiStruct):
    """``uri`` (tcp:HOST:PORT, unix:PATH or fd:NAME), or one of ``channels``. ``detach`` means nothing in QMP, as in QEMU;
    ``resume``: go on with a migration that was paused, of which there are none."""

    uri: str | UnsetType = UNSET
    channels: list[MigrationChannel] | UnsetType = UNSET
    detach: bool | UnsetType = UNSET
    resume: bool | UnsetType = UNSET
    x_hand_over: Annotated[HandOver | UnsetType, Meta(extra={"features": ("unstable",)})] = UNSET


@command("migrate")
async def migrate(ctx: Context, args: MigrateOptions) -> None:
    """Hand the guest over. Returns at once; query-migrate and the event MIGRATION tell how it goes."""
    migration = migration_of(ctx.daemon)
    address = _address(args.uri, args.channels)
    if args.resume is True:
        raise MigrationError("Cannot resume if there is no paused migration")
    state = ctx.daemon.run_state.state
    if state is State.INMIGRATE:
        raise MigrationError("Guest is waiting for an incoming migration")
    if migration.outgoing.busy:
        raise MigrationError("There's a migration process in progress")
    if migration.gone:
        raise MigrationError("The guest was migrated already: another process has it")
    over = args.x_hand_over if isinstance(args.x_hand_over, HandOver) else HandOver()
    work = Outgoing(migration, address, over.mirrors, over.ends, over.exports)
    migration.outgoing.begin()
    migration.move(migration.outgoing, _S.SETUP)
    migration.outgoing_task = asyncio.get_running_loop().create_task(work.run(), name="migration")


def _address(uri: str | UnsetType, channels: list[MigrationChannel] | UnsetType) -> Address:
    given = channels if isinstance(channels, list) else []
    if isinstance(uri, str) == bool(given):
        raise MigrationError("need either 'uri' or 'channels' argument")
    if isinstance(uri, str):
        return parse_uri(uri)
    if len(given) > 1:
        raise MigrationError("Channel list has more than one main entry")
    where = given[0].addr
    for name in ("numeric", "to", "ipv4", "ipv6", "keep_alive", "mptcp", "abstract"):
        if getattr(where, name, False) not in (UNSET, False):
            raise MigrationError(f"'{name.replace('_', '-')}' is not supported in a migration's address")
    if isinstance(where, InetChannel):
        return InetAddress(host=where.host, port=where.port)
    return UnixAddress(path=where.path) if isinstance(where, UnixChannel) else FdAddress(str=where.str)


@command("migrate_cancel")
async def migrate_cancel(ctx: Context) -> None:
    """Stop the migration that goes out, if it can still be stopped; the guest goes on here."""
    migration = migration_of(ctx.daemon)
    task = migration.outgoing_task
    if migration.outgoing.busy and not migration.gone and task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class MigrateContinue(QapiStruct):
    """``state``: the phase that is waited in."""

    state: MigrationStatus


@command("migrate-continue")
async def migrate_continue(ctx: Context, args: MigrateContinue) -> None:
    """Go on from pre-switchover."""
    migration = migration_of(ctx.daemon)
    if args.state is not migration.outgoing.status or args.state is not _S.PRE_SWITCHOVER:
        raise MigrationError(f"Migration not in expected state: {migration.outgoing.status}")
    migration.may_continue.set()


class MigrateIncoming(QapiStruct):
    """``uri``: tcp:HOST:PORT, unix:PATH or fd:NAME; or one of ``channels``. ``exit-on-error``: end the process if the migration
    fails."""

    uri: str | UnsetType = UNSET
    channels: list[MigrationChannel] | UnsetType = UNSET
    exit_on_error: bool = True


@command("migrate-incoming")
async def migrate_incoming(ctx: Context, args: MigrateIncoming) -> None:
    """Listen for a migration, after ``-incoming defer``."""
    migration = migration_of(ctx.daemon)
    address = _address(args.uri, args.channels)
    if ctx.daemon.run_state.state is not State.INMIGRATE:
        raise MigrationError("'-incoming' was not specified on the command line")
    if migration.incoming.busy:
        raise MigrationError("The incoming migration has already been started")
    migration.incoming.begin()
    work = Incoming(migration, exit_on_error=args.exit_on_error)
    await work.open(address)
    migration.incoming_task = asyncio.get_running_loop().create_task(work.run(), name="incoming-migration")


class MigrationInfo(QapiStruct):
    """Times in milliseconds."""

    status: MigrationStatus | UnsetType = UNSET
    total_time: int | UnsetType = UNSET
    downtime: int | UnsetType = UNSET
    setup_time: int | UnsetType = UNSET
    error_desc: str | UnsetType = UNSET
    socket_address: list[InetAddress | UnixAddress | VsockAddress | FdAddress] | UnsetType = UNSET


@command("query-migrate")
async def query_migrate(ctx: Context) -> MigrationInfo:
    """How the last migration goes or went; of one that came in, no more than its status and where it is waited for."""
    migration = migration_of(ctx.daemon)
    going, coming = migration.outgoing, migration.incoming
    if going.status is _S.NONE:
        return _incoming_info(migration, coming)
    info = MigrationInfo(status=going.status)
    if going.error:
        info.error_desc = going.error
    if going.status is _S.FAILED or going.status is _S.CANCELLED:
        return info
    info.total_time = _milliseconds((going.ended or now()) - going.started)
    if going.set_up:
        info.setup_time = _milliseconds(going.set_up - going.started)
    if going.downtime is not None:
        info.downtime = _milliseconds(going.downtime)
    return info


def _incoming_info(migration: Migration, coming: Progress) -> MigrationInfo:
    if coming.status is _S.NONE:
        return MigrationInfo()
    info = MigrationInfo(status=coming.status)
    if coming.error:
        info.error_desc = coming.error
    if coming.status is _S.SETUP:
        info.socket_address = list(migration.addresses)
    return info


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


class MigrateSetCapabilities(QapiStruct):
    """Each capability that is to be switched."""

    capabilities: list[MigrationCapabilityStatus]


@command("migrate-set-capabilities")
async def migrate_set_capabilities(ctx: Context, args: MigrateSetCapabilities) -> None:
    """Switch capabilities, all or none."""
    migration = migration_of(ctx.daemon)
    if migration.outgoing.busy:
        raise MigrationError("There's a migration process in progress")
    for one in args.capabilities:
        check_capability(one)
    for one in args.capabilities:
        (migration.capabilities.add if one.state else migration.capabilities.discard)(one.capability)


@command("query-migrate-capabilities")
async def query_migrate_capabilities(ctx: Context) -> list[MigrationCapabilityStatus]:
    """Every capability."""
    migration = migration_of(ctx.daemon)
    return [MigrationCapabilityStatus(capability=one, state=migration.on(one)) for one in MigrationCapability]


@command("migrate-set-parameters")
async def migrate_set_parameters(ctx: Context, args: SetParameters) -> None:
    """Set parameters, all or none."""
    apply(migration_of(ctx.daemon).parameters, args)


@command("query-migrate-parameters")
async def query_migrate_parameters(ctx: Context) -> Parameters:
    """Every parameter that there is here."""
    return migration_of(ctx.daemon).parameters
