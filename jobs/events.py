"""What jobs tell: the events, with QEMU's names and members. Source: QEMU ``qapi/job.json``, ``qapi/block-core.json``.

``device`` is the job's id. ``len`` and ``offset`` are bytes: what the job has to do in all, as far as it knows, and what of
it is done. ``speed`` is bytes a second, 0: no limit.
"""

from __future__ import annotations

import enum

from livedisk.emulator.device.policy import Action
from livedisk.emulator.qmp.events import event
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.jobs.states import JobType, Status


class IoOperation(enum.StrEnum):
    """Which side of a job failed."""

    READ = "read"
    WRITE = "write"


@event("JOB_STATUS_CHANGE")
class JobStatusChange(QapiStruct):
    """A job moved to another state."""

    id: str
    status: Status


@event("BLOCK_JOB_READY")
class BlockJobReady(QapiStruct, kw_only=True):
    """A mirror or active commit has caught up with its source: it may be completed."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_PENDING")
class BlockJobPending(QapiStruct):
    """A job waits for block-job-finalize."""

    type: JobType
    id: str


@event("BLOCK_JOB_COMPLETED")
class BlockJobCompleted(QapiStruct, kw_only=True):
    """A job is over; ``error`` says why it failed, if it did."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int
    error: str | UnsetType = UNSET


@event("BLOCK_JOB_CANCELLED")
class BlockJobCancelled(QapiStruct, kw_only=True):
    """A job was cancelled before it could be of use."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


@event("BLOCK_JOB_ERROR")
class BlockJobError(QapiStruct):
    """I/O of a job failed, and what is done about it."""

    device: str
    operation: IoOperation
    action: Action
