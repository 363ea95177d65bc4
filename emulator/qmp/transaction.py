"""``transaction``: several actions, all or none; and the actions' registry, which jobs and bitmaps add to.

Each action is prepared in turn, and does its work then, so that a later action can build on an earlier one's (a
snapshot of the overlay that the one before it made). If all could be prepared they are committed in order; if one
fails, those before it are undone, last to first. The guests' requests to a node that an action drained stay out from
then until the end: what they see changes in one step.

    @action("blockdev-snapshot")
    async def blockdev_snapshot(ctx: Context, args: BlockdevSnapshot, run: Run) -> None:
        ...                                  # raise to refuse; undo by run.steps.add(abort=...)

Source: QEMU ``qapi/transaction.json``, ``blockdev.c`` (qmp_transaction).
"""

from __future__ import annotations

import enum
import inspect
import logging
import typing
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec

from livedisk.emulator.block.node import Node
from livedisk.emulator.block.transaction import Transaction
from livedisk.emulator.errors import BlockError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.qapi import QapiStruct, define_union
from livedisk.emulator.qmp.registry import command

log = logging.getLogger(__name__)


class ActionCompletionMode(enum.StrEnum):
    """``grouped``: jobs that actions start succeed or fail together."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(QapiStruct):
    """What holds for all actions of a transaction."""

    completion_mode: ActionCompletionMode = ActionCompletionMode.INDIVIDUAL


class TransactionAction(QapiStruct):
    """One action: its ``type``; the variants add their ``data``."""

    type: str


class Run:
    """One transaction under way.

    ``steps``: what undoes or finishes what has been done, synchronously. ``afterwards``: what then remains, awaited in
    order whether the transaction succeeded or not (closing what nobody uses any more). ``on_success``: likewise, only
    after success, before ``afterwards``; the outcome stands, so what it raises is logged and not answered.
    ``properties``: the transaction's own. ``shared``: what several actions of one kind have in common, by its class.
    """

    def __init__(self, ctx: Context, properties: TransactionProperties, *, several: bool = False) -> None:
        self.properties = properties
        self._several = several
        self.steps = Transaction()
        self.shared: dict[type, Any] = {}
        self._earlier: list[tuple[Transaction, Callable[[], Awaitable[None]]]] = []
        self.on_success: list[Callable[[], Awaitable[None]]] = []
        self.afterwards: list[Callable[[], Awaitable[None]]] = []
        self._graph = ctx.daemon.graph
        self._held = AsyncExitStack()

    async def drain(self, node: Node) -> None:
        """Keep all requests off the node until the transaction is over; on return none is in flight."""
        await self._held.enter_async_context(self._graph.drained(node))

    async def still(self, *nodes: Node) -> None:
        """Let nobody write to the nodes between this action and the others, if there are any: what one says of the writes so
        far is what the next begins with (a bitmap merged into that of an overlay, one that follows another)."""
        if self._several:
            for node in nodes:
                await self.drain(node)

    def undo_by(self, call: Callable[[], Awaitable[None]]) -> None:
        """What was just done is undone by awaiting ``call``, in its turn among ``steps``. It must not fail."""
        self._earlier.append((self.steps, call))
        self.steps = Transaction()

    async def finish(self) -> None:
        """Commit, then let requests in again."""
        for steps, _ in self._earlier:
            steps.commit()
        self.steps.commit()
        for call in self.on_success:
            try:
                await call()
            except (OSError, BlockError) as error:
                log.warning("after a transaction: %s", error)
        await self._close()

    async def undo(self) -> None:
        """Take everything back, then let requests in again."""
        self.steps.abort()
        for steps, call in reversed(self._earlier):
            await call()
            steps.abort()
        await self._close()

    async def _close(self) -> None:
        try:
            for call in self.afterwards:
                await call()
        finally:
            await self._held.aclose()


Prepare = Callable[[Context, Any, Run], Awaitable[None]]
P = TypeVar("P", bound=Prepare)
ACTIONS: dict[str, tuple[type[msgspec.Struct], Prepare]] = {}
"""By type: the Struct of the action (with its ``data``) and what prepares it."""
_GROUPED: set[str] = set()


def action(name: str, *, grouped: bool = False) -> Callable[[P], P]:
    """Decorator: register what prepares the actions of type ``name``; the class of its second parameter is ``data``.

    ``grouped``: whether the action starts a job, for which ``completion-mode`` has a meaning. Raises ValueError for a
    name that is taken.
    """

    def register(prepare: P) -> P:
        if name in ACTIONS:
            raise ValueError(f"action {name!r} is registered twice")
        parameter = list(inspect.signature(prepare).parameters)[1]
        data = typing.get_type_hints(prepare, include_extras=True)[parameter]
        variant = msgspec.defstruct(
            f"{data.__name__}Action", [("data", data)], bases=(TransactionAction,), kw_only=True, rename="kebab"
        )
        ACTIONS[name] = (variant, prepare)
        if grouped:
            _GROUPED.add(name)
        return prepare

    return register


def _variants() -> Mapping[str, type[msgspec.Struct]]:
    return {name: variant for name, (variant, _) in ACTIONS.items()}


define_union(TransactionAction, "type", _variants)


class TransactionArguments(QapiStruct):
    """``actions`` in order; see `ActionCompletionMode` for ``properties``."""

    actions: list[TransactionAction]
    properties: TransactionProperties = msgspec.field(default_factory=TransactionProperties)


@command("transaction")
async def transaction(ctx: Context, args: TransactionArguments) -> None:
    """Do all actions or none. Raises what the first action raises that cannot be prepared."""
    await run_actions(ctx, args.actions, args.properties)


async def run_actions(ctx: Context, actions: list[TransactionAction], properties: TransactionProperties) -> None:
    """Prepare all, then commit all; or undo those that were prepared, and raise."""
    run = Run(ctx, properties, several=len(actions) > 1)
    for one in actions:
        if properties.completion_mode is ActionCompletionMode.GROUPED and one.type not in _GROUPED:
            raise BlockError(f"Action '{one.type}' does not support transaction property completion-mode = grouped")
    try:
        for one in actions:
            await ACTIONS[one.type][1](ctx, one.data, run)  # type: ignore[attr-defined]
    except BaseException:
        await run.undo()
        raise
    await run.finish()


async def run_single(ctx: Context, name: str, data: msgspec.Struct) -> None:
    """The command that is one action: a transaction of it alone."""
    variant, _ = ACTIONS[name]
    one = variant(type=name, data=data)
    assert isinstance(one, TransactionAction)
    await run_actions(ctx, [one], TransactionProperties())


class Abort(QapiStruct):
    """Nothing: the action only fails."""


@action("abort")
async def abort(ctx: Context, args: Abort, run: Run) -> None:
    """Make the transaction fail: for tests of clients."""
    raise BlockError("Transaction aborted using Abort action")
