"""rerror and werror: what a failed request leads to.

    policy   ENOSPC   any other error
    report   report   report
    ignore   ignore   ignore
    stop     stop     stop
    enospc   stop     report

``auto`` is ``report`` for reads and ``enospc`` for everything else. Source: QEMU ``block/block-backend.c``
(blk_get_error_action, and blk_new for the defaults), ``qapi/block-core.json`` (BlockdevOnError, BlockErrorAction).
"""

from __future__ import annotations

import enum
import errno
from typing import Final


class OnError(enum.StrEnum):
    """QEMU's BlockdevOnError."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class Action(enum.StrEnum):
    """QEMU's BlockErrorAction: what was done about a failed request."""

    IGNORE = "ignore"
    """The guest is told that it went well."""
    REPORT = "report"
    """The guest is told."""
    STOP = "stop"
    """The guest is stopped; the request is tried again when it continues."""


_ACTIONS: Final[dict[OnError, tuple[Action, Action]]] = {
    OnError.REPORT: (Action.REPORT, Action.REPORT),
    OnError.IGNORE: (Action.IGNORE, Action.IGNORE),
    OnError.STOP: (Action.STOP, Action.STOP),
    OnError.ENOSPC: (Action.STOP, Action.REPORT),
}
"""``(on ENOSPC, on any other error)``."""


def settled(policy: OnError, *, read: bool) -> OnError:
    """The policy with ``auto`` resolved."""
    if policy is not OnError.AUTO:
        return policy
    return OnError.REPORT if read else OnError.ENOSPC


def action_for(policy: OnError, number: int | None) -> Action:
    """What a failure with this ``errno`` leads to under a settled policy."""
    out_of_space, other = _ACTIONS[policy]
    return out_of_space if number == errno.ENOSPC else other
