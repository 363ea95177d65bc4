"""The two tables of every job's life: which state may follow which, and what a user may ask for in which state.

    created ──> running <──> paused                                     (aborting can be reached from every state
       │           │  └────> ready <──> standby                          between created and pending)
       │           v           │
       │        waiting <──────┘     its work is done; others of its group still work
       │           v
       │        pending ─────────┐   everybody's work is done; it waits to be finalized
       v           v             v
      null    aborting ────> concluded ──> null

Nothing else in the code knows what is legal: `job.py` looks every move and every verb up here, and a test walks every
cell. Source: QEMU ``job.c`` (JobSTT, JobVerbTable), ``qapi/job.json``.
"""

from __future__ import annotations

import enum
from typing import Final


class Status(enum.StrEnum):
    """QEMU's JobStatus."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(enum.StrEnum):
    """QEMU's JobVerb, as its messages spell it."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


class JobType(enum.StrEnum):
    """QEMU's JobType."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


S = Status
MOVES: Final[dict[Status, frozenset[Status]]] = {
    S.UNDEFINED: frozenset({S.CREATED}),
    S.CREATED: frozenset({S.RUNNING, S.ABORTING, S.NULL}),
    S.RUNNING: frozenset({S.PAUSED, S.READY, S.WAITING, S.ABORTING}),
    S.PAUSED: frozenset({S.RUNNING}),
    S.READY: frozenset({S.STANDBY, S.WAITING, S.ABORTING}),
    S.STANDBY: frozenset({S.READY}),
    S.WAITING: frozenset({S.PENDING, S.ABORTING}),
    S.PENDING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.ABORTING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.CONCLUDED: frozenset({S.NULL}),
    S.NULL: frozenset(),
}
"""From each state, the states that may follow."""

_ACTIVE: Final = frozenset({S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY})

VERBS: Final[dict[Verb, frozenset[Status]]] = {
    Verb.CANCEL: _ACTIVE | {S.WAITING, S.PENDING},
    Verb.PAUSE: _ACTIVE,
    Verb.RESUME: _ACTIVE,
    Verb.SET_SPEED: _ACTIVE,
    Verb.COMPLETE: frozenset({S.READY, S.STANDBY}),
    Verb.FINALIZE: frozenset({S.PENDING}),
    Verb.DISMISS: frozenset({S.CONCLUDED}),
    Verb.CHANGE: _ACTIVE,
}
"""For each verb, the states in which a user may ask for it."""

WORKING: Final = frozenset({S.UNDEFINED, *_ACTIVE})
"""States of a job whose own work is not over (QEMU's job_is_completed, negated)."""
