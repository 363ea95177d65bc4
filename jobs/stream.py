"""block-stream: copy what an image takes from its backing files into it, then let it stand without them.

    base <- c <- d        stream d down to base         base <- d

While it runs, a copy-on-read filter stands on the image: guests' reads copy too, and what is copied is never read from below
again. Chunk by chunk (`run`) the job asks which data the image does not hold itself but a layer above the base does, and
copies it up, each chunk exclusively, so that a guest's write always wins.

At the end (`prepare`) the data is put on stable storage before the header stops naming the images that it came from; then
the chain changes in one step. If the header cannot be written, nothing has changed but that the image holds more. The
images below stay as they are.

``total`` is the image's size; 0 where there is nothing to stream. Source: QEMU ``block/stream.c``, ``blockdev.c``
(qmp_block_stream); every message was asked from QEMU 10.0.2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

from livedisk.emulator.block.blockers import Operation, check_not_busy
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.block.status import allocation_depth
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.drivers.copy_on_read import copy_up
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.block_job import BlockJob
from livedisk.jobs.chains import chain, find_backing, links
from livedisk.jobs.commands import jobs_of
from livedisk.jobs.copy import lanes_into
from livedisk.jobs.filters import insert_filter, remove_filter, skip_filters, under
from livedisk.jobs.states import JobType, Status
from livedisk.jobs.sweep import Sweep

log = logging.getLogger(__name__)

_SHARED: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


class StreamOptions(QapiStruct, kw_only=True):
    """``device``: a device or node, also one inside a chain. ``base`` (a file name), ``base-node`` or ``bottom`` (the last
    image to be streamed) say how far down; without them everything is streamed. ``backing-file``: the name to record for
    the base. ``speed``: bytes a second."""

    job_id: str | UnsetType = UNSET
    device: str
    base: str | UnsetType = UNSET
    base_node: str | UnsetType = UNSET
    backing_file: str | UnsetType = UNSET
    backing_mask_protocol: bool = False
    bottom: str | UnsetType = UNSET
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | UnsetType = UNSET
    auto_finalize: bool = True
    auto_dismiss: bool = True


class StreamJob(BlockJob):
    """Streams into ``image`` (no filter) what stands above ``base``; ``lowest`` is the last layer to be streamed."""

    kind = JobType.STREAM

    def __init__(self, graph: Graph, image: Node, lowest: Node, options: StreamOptions) -> None:
        id = options.job_id if isinstance(options.job_id, str) else None
        super().__init__(graph, id, auto_finalize=options.auto_finalize, auto_dismiss=options.auto_dismiss)
        self._image = image
        self._lowest = lowest
        self._options = options
        self._was_read_only = image.read_only
        self._filter: Node | None = None
        self._sweep: Sweep | None = None

    @property
    def _base(self) -> Node | None:
        """What the image will stand on. Asked anew: an intermediate commit may have changed what is below."""
        return under(self._lowest)

    async def set_up(self, ctx: Context, asked: Node) -> None:
        """Make the chain writable at the top and unchangeable below, put the filter on, become known.

        Raises BlockError, PermissionConflict, LockError or OSError, with everything as it was.
        """
        try:
            self.freeze(links(self._image, self._lowest))
            if self._was_read_only:
                await set_read_only(self.graph, self._image, False)
            lowest = next(layer for layer in _upwards(self._image, self._lowest) if not layer.driver.is_filter)
            bottom = {} if lowest is self._image or self._base is None else {"bottom": lowest.name}
            try:
                self._filter = await insert_filter(
                    self.graph, "copy-on-read", asked, self._options.filter_node_name, **bottom
                )
            except BlockError as error:
                raise BlockError(f"Could not create node: {error}") from error
            self.introduce(
                jobs_of(ctx.daemon), self._filter, self._options.speed, Perm.CONSISTENT_READ, _SHARED | Perm.WRITE
            )
            self.hold(self._image, "active node", Perm.NONE, _SHARED | Perm.WRITE)
            for layer in chain(self._image)[1:]:
                if layer is self._base:
                    break
                self.hold(layer, "intermediate node", Perm.NONE, _SHARED)
            if self._image is not self._lowest and self._image.driver.snapshots():
                log.warning(
                    "node '%s' has internal snapshots: what they show of the images that it leaves is lost, as with QEMU",
                    self._image.name,
                )
        except BaseException:
            if self.status is Status.CREATED:
                self.fail_early()
            await self.clean()
            raise

    # -- the work ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        image = self._image
        if image is self._lowest:
            return
        self.total = image.size
        self._sweep = Sweep(self, self._options.on_error, self._look, self._copy, room=lanes_into(image))
        await self._sweep.run(self.total)

    async def settle(self) -> None:
        if self._sweep is not None:
            await self._sweep.lanes.empty()

    async def _copy(self, offset: int, length: int) -> None:
        await copy_up(self._image, offset, length)

    async def _look(self, offset: int, length: int) -> tuple[int, bool]:
        """The length of the run at ``offset``, and whether a layer between the image and the base holds it."""
        depth, run = await allocation_depth(self._image, offset, length, self._base)
        return run, depth > 1

    # -- the outcome -------------------------------------------------------------------------------------------------
    async def prepare(self) -> None:
        image = self._image
        self.thaw()
        if image.backing is None or image is self._lowest:
            return
        async with self._jobs.rechaining, self.graph.drained(image):
            await image.flush()
            before = image.driver.backing_filename(), image.driver.backing_format()
            while True:
                base = self._base
                await image.driver.change_backing_file(*self._recorded(base))
                if self._base is base:  # else another job that ended meanwhile took its filter away
                    break
            try:
                with Transaction() as tran:
                    if base is None:
                        self.graph.rewire(tran, detach=[image.backing])
                    else:
                        self.graph.rewire(tran, move=[(image.backing, base)])
            except BaseException:
                await image.driver.change_backing_file(*before)
                raise
            image.opened_backing = image.driver.backing_filename()

    def _recorded(self, base: Node | None) -> tuple[str | None, str | None]:
        """Name and format of the base for the image's header."""
        if base is None:
            return None, None
        base = skip_filters(base)
        name = self._options.backing_file
        fmt = base.options.driver
        if self._options.backing_mask_protocol and not base.driver.is_format:
            fmt = "raw"
        return name if isinstance(name, str) else filename(base), fmt

    async def clean(self) -> None:
        await self.let_go()
        if self._filter is not None:
            inserted, self._filter = self._filter, None
            await remove_filter(self.graph, inserted)
        if self._was_read_only and self.graph.nodes.get(self._image.name) is self._image:
            await set_read_only(self.graph, self._image, True)


def _upwards(top: Node, lowest: Node) -> Iterator[Node]:
    """The layers from ``lowest`` up to ``top``."""
    layers = chain(top)
    return reversed(layers[: layers.index(lowest) + 1])


@command("block-stream", allow_preconfig=True)
async def block_stream(ctx: Context, args: StreamOptions) -> None:
    """Copy an image's backing files, or some of them, into it while it is in use."""
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        if getattr(args, one.replace("-", "_")) is not UNSET and getattr(args, other.replace("-", "_")) is not UNSET:
            raise BlockError(f"'{one}' and '{other}' cannot be specified at the same time")
    asked = find_node(ctx, args.device, args.device)
    stop, lowest = _range(ctx, args, asked)
    for layer in chain(asked):
        if layer is stop:
            break
        check_not_busy(layer, Operation.STREAM)
    if args.backing_file is not UNSET and stop is None:
        raise BlockError("backing file specified, but streaming the entire chain")
    job = StreamJob(ctx.daemon.graph, skip_filters(asked), lowest, args)
    await job.set_up(ctx, asked)
    job.start()


def _range(ctx: Context, args: StreamOptions, top: Node) -> tuple[Node | None, Node]:
    """The node that will remain below, or None, and the last one above it. Raises BlockError or NodeNotFound."""
    layers = chain(top)
    if isinstance(args.bottom, str):
        bottom = ctx.daemon.graph.find(args.bottom)
        if bottom.driver.is_filter:
            raise BlockError(f"Node '{bottom.name}' is a filter, use a non-filter node as 'bottom'")
        if bottom not in layers:
            raise BlockError(f"Node '{bottom.name}' is not in a chain starting from '{args.device}'")
        return under(bottom), bottom
    base: Node | None = None
    if isinstance(args.base, str):
        base = find_backing(top, args.base)
        if base is None:
            raise BlockError(f"Can't find '{args.base}' in the backing chain")
    elif isinstance(args.base_node, str):
        base = ctx.daemon.graph.find(args.base_node)
        if base is top or base not in layers:
            raise BlockError(f"Node '{args.base_node}' is not a backing image of '{args.device}'")
    if base is not None and skip_filters(base) is skip_filters(top):
        raise BlockError(f"'{base.name}' is not in the backing chain of '{top.name}'")
    lowest = next(layer for layer in layers if under(layer) is base)
    return base, lowest
