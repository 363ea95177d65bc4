"""block-commit: move what stands above a base image into the base, and drop the images in between.

    base <- b <- c <- d      commit c into base         base <- d

If the top is the active layer, or somebody writes to it, the commit is *active*: a mirror into the base that ends with the
guest on the base (`mirror.py`). This module is the other kind, where nothing changes above the base while it runs but in
images above the top.

A ``commit_top`` filter stands on the top while it runs: what is above relies on what the chain shows, no more on the images in
it, so that the base may be written. The base gets nothing but what a layer above it holds: its overlays in this chain show
the same at any moment, and a job that fails leaves the chain as it was, with some of the data in the base, too.

At the end (`prepare`) the base is put on stable storage, the images above the top get its name into their headers, and
their edges move to it in one step. If a header cannot be written, the others get their old names back.

``total`` is the top's size. Source: QEMU ``block/commit.c``, ``blockdev.c`` (qmp_block_commit), ``block.c``
(bdrv_drop_intermediate); every message was asked from QEMU 10.0.2. Where we differ: an image above the top that is larger
than it sees zeroes past the top's end, and so it does afterwards: QEMU lets a larger base show through there.
"""

from __future__ import annotations

from livedisk.emulator.block.blockers import Operation, check_not_busy
from livedisk.emulator.block.graph import Graph
from livedisk.emulator.block.node import Edge, Node
from livedisk.emulator.block.permissions import Perm
from livedisk.emulator.block.reopen import set_read_only
from livedisk.emulator.block.status import allocation_depth
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.block.types import ZeroFlags
from livedisk.emulator.device.policy import OnError
from livedisk.emulator.errors import BlockError, DeviceNotFound, NodeNotFound
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.filenames import filename
from livedisk.emulator.qmp.lookup import find_node
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command
from livedisk.jobs.block_job import BlockJob, JobBackend, may_grow
from livedisk.jobs.chains import chain, find_backing, links, overlays, with_filters
from livedisk.jobs.commands import jobs_of
from livedisk.jobs.copy import copy_range, lanes_into
from livedisk.jobs.filters import insert_filter, remove_filter, skip_filters
from livedisk.jobs.mirror import ActiveCommit, check_root
from livedisk.jobs.states import JobType, Status
from livedisk.jobs.sweep import Ignored, Sweep


class CommitOptions(QapiStruct, kw_only=True):
    """``device``: the active layer, by device or node. ``top`` and ``base`` by file name, or by node. ``backing-file``: the name
    to record for the base in the image above the top. ``speed``: bytes a second."""

    job_id: str | UnsetType = UNSET
    device: str
    base_node: str | UnsetType = UNSET
    base: str | UnsetType = UNSET
    top_node: str | UnsetType = UNSET
    top: str | UnsetType = UNSET
    backing_file: str | UnsetType = UNSET
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | UnsetType = UNSET
    auto_finalize: bool = True
    auto_dismiss: bool = True


class CommitJob(BlockJob):
    """Commits the layers from ``top`` down to above ``base`` into ``base``."""

    kind = JobType.COMMIT

    def __init__(self, graph: Graph, top: Node, base: Node, options: CommitOptions) -> None:
        id = options.job_id if isinstance(options.job_id, str) else None
        super().__init__(graph, id, auto_finalize=options.auto_finalize, auto_dismiss=options.auto_dismiss)
        self._top = top
        self._base = base
        self._below = with_filters(base, top)
        self._options = options
        self._was_read_only = base.read_only
        self._filter: Node | None = None
        self._sweep: Sweep | None = None
        self._reader: JobBackend
        self._writer: JobBackend

    async def set_up(self, ctx: Context, active: Node) -> None:
        """Make the base writable, put the filter on, become known. Raises BlockError, PermissionConflict, LockError or OSError,
        with everything as it was."""
        try:
            self.introduce(jobs_of(ctx.daemon), active, self._options.speed)
            if self._was_read_only:
                await set_read_only(self.graph, self._base, False)
            name = self._options.filter_node_name
            self._filter = await insert_filter(self.graph, "commit_top", self._top, name, read_only=True)
            # Also what is above stays on the filter until the end: a stream must not take it from there.
            self.freeze([*links(self._filter, self._base), *self._overlays()])
            shared = Perm.WRITE_UNCHANGED | Perm.WRITE
            self._reader = self.hold(self._top, "intermediate node", Perm.NONE, shared)
            self.hold_between(self._top, self._base, shared)
            self._writer = self.hold(
                self._base,
                "base",
                Perm.CONSISTENT_READ | Perm.WRITE | may_grow(self._base, self._top),
                Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
            )
        except BaseException:
            if self.status is Status.CREATED:
                self.fail_early()
            await self.clean()
            raise

    # -- the work ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        self.total = self._top.size
        if self._base.size < self.total:
            async with self.drained(self._base):
                await self._writer.truncate(self.total, exact=False)
        policy, room = self._options.on_error, lanes_into(self._base)
        self._sweep = Sweep(self, policy, self._look, self._copy, Ignored.TRIED_AGAIN, room=room)
        await self._sweep.run(self.total)
        if not self.cancelled:
            await self._hide_what_lies_behind()

    async def settle(self) -> None:
        if self._sweep is not None:
            await self._sweep.lanes.empty()

    async def _look(self, offset: int, length: int) -> tuple[int, bool]:
        """The length of the run at ``offset``, and whether a layer above the base holds it."""
        depth, run = await allocation_depth(self._top, offset, length, self._below)
        return run, depth > 0

    async def _copy(self, offset: int, length: int) -> None:
        await copy_range(self._reader, self._writer, offset, length, flags=ZeroFlags.MAY_UNMAP)

    async def _hide_what_lies_behind(self) -> None:
        """Past the top's end its overlays see zeroes: let the base show the same."""
        sizes = [edge.parent.size for edge in self._overlays() if isinstance(edge.parent, Node)]
        end = min(self._base.size, max(sizes, default=0))
        if end > self._top.size:
            await self._writer.write_zeroes(self._top.size, end - self._top.size, ZeroFlags.MAY_UNMAP)

    # -- the outcome -------------------------------------------------------------------------------------------------
    def _overlays(self) -> list[Edge]:
        assert self._filter is not None
        return overlays(self._filter)

    async def prepare(self) -> None:
        assert self._filter is not None
        self.thaw()
        graph, base = self.graph, self._base
        async with self._jobs.rechaining, graph.drained(self._filter):
            await base.flush()
            graph.set_root_permissions(self._writer, Perm.NONE, Perm.ALL)
            renamed: list[tuple[Node, str | None, str | None]] = []
            try:
                for edge in self._overlays():
                    image = edge.parent
                    assert isinstance(image, Node)
                    renamed.append((image, image.driver.backing_filename(), image.driver.backing_format()))
                    await _record(graph, image, *self._recorded())
                with Transaction() as tran:
                    graph.replace_node(self._filter, base, tran)
            except BaseException:
                for image, name, fmt in renamed:
                    await _record(graph, image, name, fmt)
                raise

    def _recorded(self) -> tuple[str, str]:
        """Name and format of the base for the headers above."""
        base = skip_filters(self._base)
        name = self._options.backing_file
        fmt = base.options.driver
        if self._options.backing_mask_protocol and not base.driver.is_format:
            fmt = "raw"
        return name if isinstance(name, str) else filename(base), fmt

    async def clean(self) -> None:
        base, inserted, self._filter = self._base, self._filter, None
        if inserted is not None and inserted.filtered is not None and inserted.parents:
            self.thaw()
            self._drop_permissions()
            await remove_filter(self.graph, inserted)
            inserted = None
        await self.let_go()
        if inserted is not None:
            await self.graph.release(inserted)
        if self._was_read_only and self.graph.nodes.get(base.name) is base:
            await set_read_only(self.graph, base, True)

    def _drop_permissions(self) -> None:
        """Without the filter the chain relies on the base again: nobody of ours may write it by then."""
        for backend in self._backends:
            self.graph.set_root_permissions(backend, Perm.NONE, Perm.ALL)


async def _record(graph: Graph, image: Node, name: str | None, fmt: str | None) -> None:
    """Write the backing file's name and format into the image's header, also where the image is open read-only."""
    was_read_only = image.read_only
    if was_read_only:
        await set_read_only(graph, image, False)
    try:
        await image.driver.change_backing_file(name, fmt)
        await image.flush()
    finally:
        if was_read_only:
            await set_read_only(graph, image, True)


@command("block-commit", allow_preconfig=True)
async def block_commit(ctx: Context, args: CommitOptions) -> None:
    """Move the data of overlays down into an image below while it is in use."""
    try:
        active = find_node(ctx, args.device, args.device)
    except NodeNotFound:
        raise DeviceNotFound(f"Device '{args.device}' not found") from None
    check_root(active)
    check_not_busy(active)
    top = _find_top(ctx, args, active)
    base = _find_base(ctx, args, top)
    for layer in chain(top):
        check_not_busy(layer, Operation.COMMIT_INTO)
        if layer is base:
            break
    if top is base:
        raise BlockError("cannot commit an image into itself")
    is_active = skip_filters(top) is skip_filters(active)
    graph = ctx.daemon.graph
    if is_active or top.perm & Perm.WRITE:
        if args.backing_file is not UNSET:
            what = "is the active layer" if is_active else "has a writer on it"
            raise BlockError(f"'backing-file' specified, but 'top' {what}")
        if skip_filters(top) is skip_filters(base):
            raise BlockError("Can't mirror node into itself")
        await ActiveCommit.begin(ctx, top, base, args)
        return
    for edge in overlays(top):
        assert isinstance(edge.parent, Node)
        check_not_busy(edge.parent, Operation.COMMIT_INTO)
    job = CommitJob(graph, top, base, args)
    await job.set_up(ctx, active)
    job.start()


def _find_top(ctx: Context, args: CommitOptions, active: Node) -> Node:
    """Raises BlockError or NodeNotFound in QEMU's words."""
    if args.top_node is not UNSET and args.top is not UNSET:
        raise BlockError("'top-node' and 'top' are mutually exclusive")
    if isinstance(args.top_node, str):
        return _in_chain(ctx.daemon.graph, active, args.top_node)
    if isinstance(args.top, str) and args.top not in (filename(active), filename(skip_filters(active))):
        top = find_backing(active, args.top)
        if top is None:
            raise BlockError(f"Top image file {args.top} not found")
        return top
    return active


def _find_base(ctx: Context, args: CommitOptions, top: Node) -> Node:
    """Raises BlockError or NodeNotFound in QEMU's words."""
    if args.base_node is not UNSET and args.base is not UNSET:
        raise BlockError("'base-node' and 'base' are mutually exclusive")
    if isinstance(args.base_node, str):
        return _in_chain(ctx.daemon.graph, top, args.base_node)
    if isinstance(args.base, str):
        base = find_backing(top, args.base)
        if base is None:
            raise BlockError(f"Can't find '{args.base}' in the backing chain")
        return base
    return chain(top)[-1]


def _in_chain(graph: Graph, top: Node, name: str) -> Node:
    node = graph.find(name)
    if node not in chain(top):
        raise BlockError(f"'{name}' is not in this backing file chain")
    return node
