"""The commands on jobs that run: query-jobs, query-block-jobs, and the verbs, each as job-* and as block-job-*.

The two families differ in what they call a job that is not there, and in that block-job-cancel asks softly (mirrors and
active commits that are ready then end in success) where job-cancel forces. Source: QEMU ``qapi/job.json``,
``qapi/block-core.json``, ``job-qmp.c``, ``blockdev.c``; every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

from livedisk.emulator.errors import BlockError, DeviceNotActive
from livedisk.emulator.qmp.context import Context, Daemon
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType, define_union
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.block_job import BlockJob, IoStatus
from livedisk.jobs.job import Job, Jobs
from livedisk.jobs.states import JobType, Status, Verb


def jobs_of(daemon: Daemon) -> Jobs:
    """The daemon's jobs; made when first asked for."""
    found = daemon.extensions.get(Jobs)
    if found is None:
        found = daemon.extensions[Jobs] = Jobs(daemon.events.emit)
    assert isinstance(found, Jobs)
    return found


def _job(ctx: Context, id: str) -> Job:
    job = jobs_of(ctx.daemon).find(id)
    if job is None:
        raise BlockError("Job not found")
    return job


def _block_job(ctx: Context, id: str) -> BlockJob:
    job = jobs_of(ctx.daemon).find(id)
    if not isinstance(job, BlockJob):
        raise DeviceNotActive(f"Block job '{id}' not found")
    return job


# -- looking -------------------------------------------------------------------------------------------------------


class JobInfo(QapiStruct, kw_only=True):
    """Progress is in units of the job's own: bytes, for block jobs."""

    id: str
    type: JobType
    status: Status
    current_progress: int
    total_progress: int
    error: str | UnsetType = UNSET


@command("query-jobs", allow_preconfig=True)
async def query_jobs(ctx: Context) -> list[JobInfo]:
    """Every job, the newest first."""
    return [
        JobInfo(
            id=job.id,
            type=job.kind,
            status=job.status,
            current_progress=job.done,
            total_progress=job.total,
            error=UNSET if job.error_text is None else job.error_text,
        )
        for job in jobs_of(ctx.daemon)
    ]


class BlockJobInfo(QapiStruct, kw_only=True):
    """``len``, ``offset``: bytes; ``speed``: bytes a second, 0 without a limit."""

    type: JobType
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: IoStatus
    ready: bool
    status: Status
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET


class BlockJobInfoMirror(BlockJobInfo, kw_only=True):
    """``actively-synced``: whether every guest write reaches the target before it is acknowledged.

    Ours: ``x-remaining``, the bytes that the target lacks now; ``x-dirty-rate`` and ``x-copy-rate``, by how many bytes a
    second that grew and was copied of late; ``x-seconds-left``, when the mirror will have caught up at that pace: absent
    where it does not gain on the guest.
    """

    actively_synced: bool
    x_remaining: int
    x_dirty_rate: int
    x_copy_rate: int
    x_seconds_left: int | UnsetType = UNSET


INFOS: dict[str, type[BlockJobInfo]] = {kind.value: BlockJobInfo for kind in JobType}
INFOS[JobType.MIRROR] = BlockJobInfoMirror
define_union(BlockJobInfo, "type", lambda: INFOS)


@command("query-block-jobs", allow_preconfig=True)
async def query_block_jobs(ctx: Context) -> list[BlockJobInfo]:
    """Every job on block nodes, the newest first."""
    return [_describe(job) for job in jobs_of(ctx.daemon) if isinstance(job, BlockJob)]


def _describe(job: BlockJob) -> BlockJobInfo:
    members: dict[str, Any] = {
        "type": job.kind,
        "device": job.id,
        "len": job.total,
        "offset": job.done,
        "busy": job.busy,
        "paused": job.paused,
        "speed": job.rate.speed,
        "io_status": job.io_status,
        "ready": job.ready,
        "status": job.status,
        "auto_finalize": job.auto_finalize,
        "auto_dismiss": job.auto_dismiss,
        "error": UNSET if job.error_text is None else job.error_text,
    }
    make: Callable[..., BlockJobInfo] = INFOS[job.kind]
    return make(**members, **job.details())


# -- verbs -----------------------------------------------------------------------------------------------------------


class JobId(QapiStruct):
    """A job."""

    id: str


class BlockJobDevice(QapiStruct):
    """A job, under the name that its id had when a device had one job."""

    device: str


@command("job-pause", allow_preconfig=True)
async def job_pause(ctx: Context, args: JobId) -> None:
    """Hold a job at its next pause point, until job-resume."""
    _job(ctx, args.id).user_pause()


@command("block-job-pause", allow_preconfig=True)
async def block_job_pause(ctx: Context, args: BlockJobDevice) -> None:
    """As job-pause."""
    _block_job(ctx, args.device).user_pause()


@command("job-resume", allow_preconfig=True)
async def job_resume(ctx: Context, args: JobId) -> None:
    """Let a paused job go on; an error that stopped it is forgotten."""
    _job(ctx, args.id).user_resume()


@command("block-job-resume", allow_preconfig=True)
async def block_job_resume(ctx: Context, args: BlockJobDevice) -> None:
    """As job-resume."""
    _block_job(ctx, args.device).user_resume()


@command("job-cancel", allow_preconfig=True)
async def job_cancel(ctx: Context, args: JobId) -> None:
    """End a job as failed, whatever it has reached."""
    await _job(ctx, args.id).user_cancel(force=True)


class BlockJobCancel(QapiStruct):
    """``force``: also where the job is paused, and as failed even where it is ready."""

    device: str
    force: bool = False


@command("block-job-cancel", allow_preconfig=True)
async def block_job_cancel(ctx: Context, args: BlockJobCancel) -> None:
    """End a job: a ready mirror with a consistent copy, everything else as failed."""
    job = _block_job(ctx, args.device)
    if job.user_paused and not args.force:
        raise BlockError(f"The block job for device '{args.device}' is currently paused")
    await job.user_cancel(force=args.force)


@command("job-complete", allow_preconfig=True)
async def job_complete(ctx: Context, args: JobId) -> None:
    """End a ready job in success."""
    _job(ctx, args.id).user_complete()


@command("block-job-complete", allow_preconfig=True)
async def block_job_complete(ctx: Context, args: BlockJobDevice) -> None:
    """As job-complete."""
    _block_job(ctx, args.device).user_complete()


@command("job-finalize", allow_preconfig=True)
async def job_finalize(ctx: Context, args: JobId) -> None:
    """Make a pending job's outcome, and its group's, real."""
    await _job(ctx, args.id).user_finalize()


@command("block-job-finalize", allow_preconfig=True)
async def block_job_finalize(ctx: Context, args: JobId) -> None:
    """As job-finalize."""
    await _block_job(ctx, args.id).user_finalize()


@command("job-dismiss", allow_preconfig=True)
async def job_dismiss(ctx: Context, args: JobId) -> None:
    """Forget a concluded job."""
    _job(ctx, args.id).user_dismiss()


@command("block-job-dismiss", allow_preconfig=True)
async def block_job_dismiss(ctx: Context, args: JobId) -> None:
    """As job-dismiss."""
    _block_job(ctx, args.id).user_dismiss()


class BlockJobSetSpeed(QapiStruct):
    """``speed``: bytes a second; 0: no limit."""

    device: str
    speed: int


@command("block-job-set-speed", allow_preconfig=True)
async def block_job_set_speed(ctx: Context, args: BlockJobSetSpeed) -> None:
    """Limit a job's speed, from now on."""
    _block_job(ctx, args.device).set_speed(args.speed)


class MirrorCopyMode(enum.StrEnum):
    """When a guest's write reaches a mirror's target: later, or before it is acknowledged."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


class BlockJobChangeOptions(QapiStruct):
    """What block-job-change takes: the variants belong to the kinds that have something to change."""

    id: str
    type: JobType


class BlockJobChangeOptionsMirror(BlockJobChangeOptions, kw_only=True):
    """Of a mirror."""

    copy_mode: MirrorCopyMode


def _change_variants() -> Mapping[str, type[BlockJobChangeOptions]]:
    plain: dict[str, type[BlockJobChangeOptions]] = {kind.value: BlockJobChangeOptions for kind in JobType}
    return plain | {JobType.MIRROR.value: BlockJobChangeOptionsMirror}


define_union(BlockJobChangeOptions, "type", _change_variants)


@command("block-job-change", allow_preconfig=True)
async def block_job_change(ctx: Context, args: BlockJobChangeOptions) -> None:
    """Change a running job's options."""
    job = _block_job(ctx, args.id)
    job.check_verb(Verb.CHANGE)
    await job.change(args)
