"""What a node's generic options come to: as given, else inherited from the parent that describes it, else QEMU's defaults.

Opening and reopening settle options by the same rules, so that a reopen without an option means what an open without it means.
Source: QEMU ``block.c`` (bdrv_inherited_options, bdrv_open_common, bdrv_reopen_prepare).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from livedisk.emulator.block.options import BlockdevOptions, CacheOptions
from livedisk.emulator.block.permissions import Role
from livedisk.emulator.block.types import DetectZeroes, Discard
from livedisk.emulator.errors import BlockError

if TYPE_CHECKING:
    from livedisk.emulator.block.node import Node


@dataclass(frozen=True, slots=True)
class Settings:
    """The generic options of one node, settled."""

    read_only: bool
    auto_read_only: bool
    force_share: bool
    cache_direct: bool
    cache_no_flush: bool
    discard_mode: Discard
    detect_zeroes: DetectZeroes

    @classmethod
    def of(cls, node: Node) -> Settings:
        """What the node runs with."""
        return cls(
            node.read_only,
            node.auto_read_only,
            node.force_share,
            node.cache_direct,
            node.cache_no_flush,
            node.discard_mode,
            node.detect_zeroes,
        )

    def apply(self, node: Node) -> None:
        """Let the node run with these."""
        node.read_only = self.read_only
        node.auto_read_only = self.auto_read_only
        node.force_share = self.force_share
        node.cache_direct = self.cache_direct
        node.cache_no_flush = self.cache_no_flush
        node.discard_mode = self.discard_mode
        node.detect_zeroes = self.detect_zeroes


def settle(options: BlockdevOptions, parent: Settings | None, role: Role) -> Settings:
    """Settle the options of a node that ``parent`` describes as a child in ``role``; None: it stands for itself.

    Raises BlockError, in QEMU's words, where the options contradict each other.
    """
    cache = options.cache if isinstance(options.cache, CacheOptions) else CacheOptions()
    below = bool(role & Role.COW)
    settled = Settings(
        read_only=_pick(options.read_only, below or (parent.read_only if parent else False)),
        auto_read_only=_pick(options.auto_read_only, parent is not None and not below),
        force_share=_pick(options.force_share, parent.force_share if parent else False),
        cache_direct=_pick(cache.direct, parent.cache_direct if parent else False),
        cache_no_flush=_pick(cache.no_flush, parent.cache_no_flush if parent else False),
        discard_mode=_pick(options.discard, Discard.UNMAP if parent else Discard.IGNORE),
        detect_zeroes=_pick(options.detect_zeroes, DetectZeroes.OFF),
    )
    if settled.detect_zeroes is DetectZeroes.UNMAP and settled.discard_mode is not Discard.UNMAP:
        raise BlockError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    if settled.force_share and not settled.read_only:
        raise BlockError("force-share=on can only be used with read-only images")
    return settled


def _pick(given: Any, default: Any) -> Any:
    return default if given is msgspec.UNSET else given
