"""blockdev-create and x-blockdev-amend: jobs that make an image, or change its format's own properties.

Neither is about a guest's data, so neither is a block job: no speed, no error policy, no node that others see in use by a job.
Progress is 0 or 1 of 1. A job stays, concluded, until job-dismiss: only so is its outcome, and the text of its failure, not
lost to a client that asks later. Source: QEMU ``block/create.c``, ``block/amend.c``; every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec

from livedisk.emulator.block.creation import BlockdevAmendOptions, BlockdevCreateOptions
from livedisk.emulator.block.driver import DRIVERS, driver_class
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import QapiStruct, define_union
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.commands import jobs_of
from livedisk.jobs.job import Job
from livedisk.jobs.states import JobType


class ImageJob(Job):
    """One call that is over when it returns. It cannot be interrupted: a cancel that comes meanwhile only decides what is
    told."""

    def __init__(self, id: str, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__(id, auto_dismiss=False)
        self._work = work

    async def run(self) -> None:
        self.total = 1
        try:
            await self._work()
        finally:
            self.done = 1


class CreateJob(ImageJob):
    """Makes an image."""

    kind = JobType.CREATE


class AmendJob(ImageJob):
    """Changes one."""

    kind = JobType.AMEND


def _creations() -> Mapping[str, type[msgspec.Struct]]:
    return {name: cls.create_options() or BlockdevCreateOptions for name, cls in DRIVERS.items() if not cls.internal}


def _amendments() -> Mapping[str, type[msgspec.Struct]]:
    return {name: cls.amend_options() or BlockdevAmendOptions for name, cls in DRIVERS.items() if not cls.internal}


define_union(BlockdevCreateOptions, "driver", _creations)
define_union(BlockdevAmendOptions, "driver", _amendments)


class BlockdevCreate(QapiStruct):
    """``options`` as the driver takes them."""

    job_id: str
    options: BlockdevCreateOptions


@command("blockdev-create", allow_preconfig=True)
async def blockdev_create(ctx: Context, args: BlockdevCreate) -> None:
    """Start a job that makes an image; what goes wrong from there on is the job's error."""
    cls, options, graph = driver_class(args.options.driver), args.options, ctx.daemon.graph
    if cls.create_options() is None:
        raise BlockError("Driver does not support blockdev-create")
    _start(ctx, CreateJob(args.job_id, lambda: cls.create(graph, options)))


class XBlockdevAmend(QapiStruct):
    """``force``: also where that may lose something (a key that is the last one)."""

    job_id: str
    node_name: str
    options: BlockdevAmendOptions
    force: bool = False


@command("x-blockdev-amend", allow_preconfig=True, features=("unstable",))
async def x_blockdev_amend(ctx: Context, args: XBlockdevAmend) -> None:
    """Start a job that changes the properties of a node's format, in its image."""
    node, options, force = ctx.daemon.graph.find(args.node_name), args.options, args.force
    driver_class(options.driver)
    if node.options.driver != options.driver:
        raise BlockError("x-blockdev-amend doesn't support changing the block driver")
    if node.driver.amend_options() is None:
        raise BlockError("Driver does not support x-blockdev-amend")
    job = AmendJob(args.job_id, lambda: node.driver.amend(options, force=force))
    await node.driver.amend_prepare(options)
    _start(ctx, job)


def _start(ctx: Context, job: Job) -> None:
    jobs_of(ctx.daemon).add(job)
    job.start()
