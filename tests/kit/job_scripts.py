"""Scripts of commands on jobs, played to qemu-storage-daemon and to livedisk: replies, each job's events, images at the end.

What the two tell while a job runs depends on who is faster, so replies are compared with replies and the events of all with
the events of all, not how they interleave with replies.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.livedisk import Daemon
from kit.qemu import StorageDaemon, check, info, read_all
from kit.qmp import Qmp, QmpError
from kit.side_by_side import differences

Step = tuple[str, dict[str, Any]] | str
"""A command with its arguments; or the status of a job to wait for, "STATUS@JOB" where there are several jobs,
"stopped" for one that an error stops."""

UNEQUAL = {"BLOCK_JOB_CANCELLED": ("offset", "len")}
"""Members of events that are not compared: how far a job had come is a matter of speed."""


def c(command: str, /, **arguments: Any) -> Step:
    """A command; ``_`` in names stands for ``-``, FOLDER in values for the peer's folder."""
    return command, {name.replace("_", "-"): value for name, value in arguments.items()}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a script finds: ``prepare(folder)`` makes the images, ``options(folder)`` opens them. In the end every image of
    ``images`` (names without ".qcow2") is checked and its chain compared, of ``contents`` the bytes, too. ``members``: what is
    compared of the nodes that are left."""

    prepare: Callable[[Path], None]
    options: Callable[[Path], Sequence[str]]
    images: Sequence[str]
    contents: Sequence[str]
    members: Sequence[str] = ("node-name", "drv", "ro", "backing_file")


class Played:
    """What a script came to: replies in order, events a job, the chain on disk of every image, the bytes of each."""

    def __init__(
        self, peer: type[StorageDaemon], folder: Path, stage: Stage, script: Sequence[Step], scratch: Path
    ) -> None:
        folder.mkdir()
        stage.prepare(folder)
        self._folder = folder
        self._stage = stage
        self.replies: list[Any] = []
        self.events: list[Any] = []
        with peer(folder, *stage.options(folder), nbd=False) as daemon, daemon.qmp(timeout=20) as qmp:
            self._qmp = qmp
            for step in script:
                if isinstance(step, str):
                    self._wait(step)
                else:
                    self.replies.append(self._ask(qmp, *step))
            self._collect()
            self.replies.append(self._comparable(self._graph(qmp)))
            self._collect()
        self.chains = {}
        for name in stage.images:
            path = folder / f"{name}.qcow2"
            check(path)
            self.chains[name] = self._comparable([one["filename"] for one in info(path, "--backing-chain")])
        self.bytes = {name: read_all(folder / f"{name}.qcow2", scratch) for name in stage.contents}

    def _ask(self, qmp: Qmp, command: str, arguments: dict[str, Any]) -> Any:
        arguments = json.loads(json.dumps(arguments).replace("FOLDER", str(self._folder)))
        try:
            answer = qmp.call(command, arguments)
        except QmpError as error:
            return self._comparable({"class": error.kind, "desc": error.desc})
        finally:
            self._collect()
        return self._comparable(answer)

    def _comparable(self, answer: Any) -> Any:
        text = json.dumps(answer, sort_keys=True).replace(str(self._folder), "")
        text = re.sub(r"#block\d+", "#block", text)
        # Whether it works at this very moment is a matter of chance.
        text = re.sub(r'"busy": \w+', '"busy": 0', text)
        # Ours alone: how fast a mirror goes.
        return json.loads(re.sub(r', "x-[a-z-]+": \d+', "", text))

    def _graph(self, qmp: Qmp) -> list[Any]:
        nodes = qmp.execute("query-named-block-nodes", flat=True)
        found = [{name: node[name] for name in self._stage.members if name in node} for node in nodes]
        return sorted((one for one in found if not one["node-name"].startswith("#")), key=lambda one: one["node-name"])

    def _wait(self, wanted: str) -> None:
        if wanted == "stopped":
            self._wait_until_an_error_stopped_a_job()
            return
        status, _, job = wanted.partition("@")
        deadline = time.monotonic() + 20
        while not any(
            event[1].get("status") == status and (not job or event[1].get("id") == job) for event in self.events
        ):
            assert time.monotonic() < deadline, f"no {wanted}: {self.events}"
            time.sleep(0.01)
            self._qmp.execute("query-version")
            self._collect()
        # The next one waits for one that is to come.
        self.events = [
            (
                name,
                {**data, "status": f"*{data['status']}"}
                if "status" in data and (not job or data["id"] == job)
                else data,
            )
            for name, data in self.events
        ]

    def _wait_until_an_error_stopped_a_job(self) -> None:
        deadline = time.monotonic() + 20
        while not any(
            job["io-status"] != "ok" and job["status"] == "paused" for job in self._qmp.execute("query-block-jobs")
        ):
            assert time.monotonic() < deadline, f"no job was stopped: {self.events}"
            time.sleep(0.01)
        self._collect()

    def _collect(self) -> None:
        while self._qmp.events:
            event = self._qmp.events.popleft()
            self.events.append((event["event"], event.get("data", {})))

    def told(self) -> dict[str, list[Any]]:
        """The events of each job, without the pauses that nobody asked for."""
        kept: dict[str, list[Any]] = {}
        for name, data in self.events:
            left_out = UNEQUAL.get(name, ())
            one = (name, {key: str(value).lstrip("*") for key, value in data.items() if key not in left_out})
            kept.setdefault(data.get("id") or data.get("device") or "", []).append(one)
        return {job: _without_pauses(events) for job, events in kept.items()}


def _without_pauses(events: list[Any]) -> list[Any]:
    statuses = [one[1].get("status") for one in events]
    drop: set[int] = set()
    for index, status in enumerate(statuses):
        if status in ("paused", "standby") and statuses[index + 1 : index + 2] in (["running"], ["ready"]):
            drop |= {index, index + 1}
    return [one for index, one in enumerate(events) if index not in drop]


def assert_alike(stage: Stage, script: Sequence[Step], folder: Path, scratch: Path) -> None:
    """Play the script to both, in a short folder, and fail with every difference. ``scratch``: another folder."""
    theirs = Played(StorageDaemon, folder / "q", stage, script, scratch)
    ours = Played(Daemon, folder / "l", stage, script, scratch)
    asked = [*(step for step in script if not isinstance(step, str)), "the nodes at the end"]
    found: list[str] = []
    for step, one, other in zip(asked, theirs.replies, ours.replies, strict=True):
        if different := list(differences("", one, other)):
            found.append("\n  ".join([str(step), *different]))
    found += differences("events", theirs.told(), ours.told())
    found += differences("chains", theirs.chains, ours.chains)
    found += [f"{name}: another content" for name in stage.contents if theirs.bytes[name] != ours.bytes[name]]
    assert not found, "\n".join(found)
