"""Operators of the soak of several jobs: each draws what to do on a disk, sees its jobs through, and holds what came of them
against the model. Role and rules: `jobs/test_soak_together.py`; disks and jobs: `soak_disks.py`."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from kit.livedisk import Daemon
from kit.peers import run
from kit.qemu import qemu_img, read_all
from kit.qmp import Qmp, QmpError
from kit.sector_history import SECTOR, Look
from kit.soak_disks import LONGEST_CHAIN, MOST_SECTORS, Asked, Line, Saved, drawn_mirror
from livedisk.jobs.states import MOVES, Status

PATIENCE: Final = 60.0
"""Seconds in which a job ends once nothing holds it up."""
MODES: Final = ("on-success", "never", "always")
FULL: Final[dict[str, Any]] = {
    "driver": "blkdebug",
    "inject-error": [{"event": "write_aio", "errno": 28, "once": True}],
}
"""A file that takes all writes but one."""
NO_SPACE: Final = "No space left on device"


class Operator:
    """Does one thing after the other by a monitor of its own."""

    def __init__(self, soak: Soak, number: int, qmp: Qmp) -> None:
        self.soak, self.number, self.qmp = soak, number, qmp
        self.chance = random.Random(soak.chance.random())
        self.serial = 0
        self.doing: list[Asked] = []
        self.log: list[str] = []

    async def command(self, name: str, /, **arguments: Any) -> Any:
        """Raises `kit.qmp.QmpError`."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        if name != "query-jobs":
            self.log = [*self.log[-30:], f"{time.monotonic():.3f} {name} {given}"]
        try:
            return await asyncio.to_thread(self.qmp.call, name, given)
        except QmpError as error:
            self.log.append(f"  {error}")
            raise
        finally:
            self._read_events()

    def count(self, what: str) -> None:
        self.soak.done[what] += 1

    async def work(self) -> None:
        """Until it is over."""
        while not self.soak.over:
            await asyncio.sleep(self.chance.uniform(0, 0.05))
            line = self.chance.choice(self.soak.lines)
            what = self.chance.random()
            if what < 0.2 or len(line.chain) < 3:
                await self.snapshot(line)
            elif what < 0.26:
                await self.grow(line)
            elif what < 0.36:
                await self._act(line, self.soak.rarely)
            else:
                await self._act(line, self.soak.often)

    async def _act(self, line: Line, names: Sequence[str]) -> None:
        name = self.chance.choice(names)
        if name == "grouped":
            await self.grouped()
        elif name in ("save", "look_at"):
            await getattr(self, name)(line)
        else:
            await self._single(line, getattr(self, name))

    # -- snapshots and growth --------------------------------------------------------------------------------------------
    async def _add_node(self, line: Line, name: str, *, below: str | None = None, **file: Any) -> None:
        given = {"driver": "file", "filename": str(line.path(name)), "discard": "unmap"}
        file = {**file, "image": given} if file else given
        await self.command(
            "blockdev-add", driver="qcow2", node_name=name, file=file, discard="unmap", backing=below
        )  # fmt: skip

    async def snapshot(self, line: Line) -> None:
        """With the bitmap taken along, in one transaction, as libvirt does."""
        async with line.lock:
            if len(line.chain) >= LONGEST_CHAIN or +line.tops:
                return  # (while the guest goes over to another image, which one is its own now is not known here)
            old, name = line.top, await asyncio.to_thread(line.new_image, line.top)
            if +line.tops:
                line.path(name).unlink()
                return
            undisturbed = line.free([old])
            saved = line.saved if line.saved is not None and not line.saved.busy else None
            try:
                line.tops[name] += 1
                if saved is None and self.chance.random() < 0.5:
                    await self.command(
                        "blockdev-snapshot-sync",
                        node_name=old, snapshot_file=str(line.path(name)), snapshot_node_name=name, mode="existing",
                    )  # fmt: skip
                else:
                    await self._add_node(line, name)
                    actions = [{"type": "blockdev-snapshot", "data": {"node": old, "overlay": name}}]
                    actions[:0] = self._carry(saved, name) if saved is not None else []
                    await self.command("transaction", actions=actions)
            except QmpError:
                if undisturbed:
                    raise
                self.count("snapshot refused")
                await self._forget(line, name)
            else:
                line.came_on_top(old, name)
                if saved is not None and saved is line.saved:
                    saved.node = name
                elif line.saved is not None:
                    self.lose_bitmap(line)  # nobody records what the guest writes from now on
                self.count("snapshot" if saved is None else "snapshot with bitmap")
            finally:
                line.tops[name] -= 1

    def _carry(self, saved: Saved, to: str) -> list[dict[str, Any]]:
        old = {"node": saved.node, "name": saved.name}
        return [
            {"type": "block-dirty-bitmap-add", "data": {"node": to, "name": saved.name, "granularity": 65536}},
            {"type": "block-dirty-bitmap-merge", "data": {"node": to, "target": saved.name, "bitmaps": [old]}},
        ]

    async def _forget(self, line: Line, name: str) -> None:
        try:
            await self.command("blockdev-del", node_name=name)
        except QmpError as error:
            if "Failed to find node" not in error.desc:  # it was closed with its last user
                raise
        line.path(name).unlink()

    async def grow(self, line: Line) -> None:
        async with line.lock:
            more = line.sectors + 8 * self.chance.randrange(1, 64)
            if more > MOST_SECTORS or +line.tops:
                return
            undisturbed = line.free([line.top])
            try:
                await self.command("block_resize", node_name=line.top, size=more * SECTOR)
            except QmpError:
                if undisturbed:
                    raise
                self.count("growth refused")
                return
            line.history.grow(more)
            line.sectors = line.clients.sectors = more
            self.count("growth")

    # -- jobs to ask for; no await in them but for the target's node -----------------------------------------------------------
    async def stream(self, line: Line) -> Asked | None:
        chain = line.chain
        into = self.chance.randrange(1, len(chain))
        base = self.chance.randrange(-1, into)
        arguments: dict[str, Any] = {"device": chain[into]}
        if base >= 0:
            arguments |= self.chance.choice(({"base-node": chain[base]}, {"bottom": chain[base + 1]}))
        if base == into - 1 and "bottom" in arguments:
            return None  # nothing lies between, and the bottom would be the image itself
        between, edge = chain[base + 1 : into], chain[base : base + 1] if base >= 0 else []
        return Asked(
            line, "block-stream", arguments, alone=(*between, chain[into]), together=(*edge,), removes=(*between,)
        )

    async def commit(self, line: Line) -> Asked | None:
        chain = line.chain
        top = self.chance.randrange(1, len(chain) - 1)
        base = self.chance.randrange(top)
        arguments = {"device": chain[-1], "top-node": chain[top], "base-node": chain[base]}
        gone = (*chain[base + 1 : top + 1],)
        # A commit is a job of the guest's image, too, which nobody else may work on meanwhile.
        edge = (*chain[top + 1 : -1][:1],)
        return Asked(line, "block-commit", arguments, (chain[base], *gone, chain[-1]), edge, removes=gone)

    async def active_commit(self, line: Line) -> Asked | None:
        chain = line.chain
        base = self.chance.randrange(len(chain) - 1)
        end = self.chance.choice(("complete", "complete", "cancel"))
        asked = Asked(
            line, "block-commit", {"device": chain[-1], "base-node": chain[base]}, end=end, alone=(*chain[base:],)
        )
        if end == "complete":
            asked.removes = (*chain[base + 1 :],)
        return asked

    async def mirror(self, line: Line) -> Asked | None:
        chain = line.chain
        sync = self.chance.choice(("full", "top", "none"))
        below = {"full": [], "top": chain[:-1], "none": chain}[sync]
        end = self.chance.choice(("complete", "complete", "cancel")) if sync != "none" else "complete"
        alone = (chain[-1],) if end == "cancel" and sync == "full" else (*chain,)
        if not line.free(alone):
            return None
        target = await asyncio.to_thread(line.new_image, below[-1] if below else None)
        name, arguments = drawn_mirror(self.chance, chain[-1], sync, target, line.path(target))
        if name == "blockdev-mirror":
            await self._add_node(line, target, below=below[-1] if below else None)
        asked = Asked(line, name, arguments, end=end, made=target, alone=alone)
        if end == "complete":
            asked.puts_on, asked.removes = target, tuple(name for name in chain if name not in below)
        elif sync == "full":
            asked.target = target
        return asked

    async def backup(self, line: Line) -> Asked | None:
        if self.chance.random() < 0.5:
            return await self.bitmap_backup(line)
        chain = line.chain
        sync = self.chance.choice(("full", "full", "top", "none"))
        # With top, drive-backup opens the images below by their names: nobody may be writing to one.
        together = (*chain,) if sync == "top" else (chain[-1],)
        if not line.free((), together):
            return None
        target = await asyncio.to_thread(line.new_image, chain[-2] if sync == "top" else None)
        arguments: dict[str, Any] = {"device": chain[-1], "sync": sync, "compress": self.chance.random() < 0.3}
        if sync == "none" or self.chance.random() < 0.5:
            name = "drive-backup"
            arguments |= {"target": str(line.path(target)), "format": "qcow2", "mode": "absolute-paths"}
        else:
            name = "blockdev-backup"
            arguments["target"] = target
            await self._add_node(line, target, below=chain[-2] if sync == "top" else None)
        asked = Asked(line, name, arguments, made=target, at_start=True, endless=sync == "none", together=together)
        asked.target = "" if asked.endless else target
        return asked

    async def bitmap_backup(self, line: Line, *, fails: bool = False) -> Asked | None:
        """The next of a chain of incremental backups, or one that another may go on with."""
        saved = line.saved
        if saved is None or saved.busy or not line.free((), (line.top,)):
            return None
        mode = self.chance.choice(MODES)
        target = saved.partial or await asyncio.to_thread(line.new_image, saved.image)
        if saved.partial:
            # What it has of changes is no more in the bitmap: only what ends as always does is sure to be of one moment.
            size = str(line.sectors * SECTOR)
            await asyncio.to_thread(qemu_img, "resize", "-q", "--shrink", line.path(target), size)
        sync = "incremental" if mode == "on-success" and self.chance.random() < 0.5 else "bitmap"
        arguments: dict[str, Any] = {"device": line.top, "target": target, "sync": sync, "bitmap": saved.name}
        if sync == "bitmap":
            arguments["bitmap-mode"] = mode
        await self._add_node(line, target, **(FULL if fails else {}))
        asked = Asked(
            line, "blockdev-backup", arguments, target=target, made=target, at_start=True, together=(line.top,)
        )
        asked.bitmap, asked.mode = saved, mode
        return asked

    # -- one job, or a group -------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def claim(self, asked: Asked) -> AsyncIterator[None]:
        line = asked.line
        line.alone.update(asked.alone)
        line.together.update(asked.together)
        line.working.append(asked)
        if asked.bitmap is not None:
            asked.bitmap.busy = True
        try:
            yield
        finally:
            line.alone.difference_update(asked.alone)
            line.together.subtract(asked.together)
            line.working.remove(asked)
            if asked.bitmap is not None:
                asked.bitmap.busy = False

    def _options(self, asked: Asked) -> dict[str, Any]:
        self.serial += 1
        asked.id = f"j{self.number}-{self.serial}"
        asked.auto_dismiss = self.chance.random() < 0.4
        options: dict[str, Any] = {"job-id": asked.id, "auto-dismiss": asked.auto_dismiss}
        if self.chance.random() < 0.3:
            options["auto-finalize"] = False
        if self.chance.random() < 0.3:
            options["speed"] = self.chance.choice((1 << 20, 4 << 20, 64 << 20))
        return options

    async def _single(self, line: Line, kind: Callable[[Line], Awaitable[Asked | None]]) -> None:
        daring = self.chance.random() < 0.5
        async with line.lock:
            asked = await kind(line) if len(line.chain) >= 3 else None
            if asked is None:
                return
            if not line.free(asked.alone, asked.together):
                if not daring or not line.free(asked.alone) or asked.made:
                    return  # (what was free when an image was made for it is so still: the lock is held)
                daring = True
            else:
                daring = False
            claim = self.claim(asked)
            await claim.__aenter__()
            try:
                started = await self._start(asked, daring=daring)
            except BaseException:
                await claim.__aexit__(None, None, None)
                raise
        try:
            if started:
                await self._see_through([asked])
        finally:
            await claim.__aexit__(None, None, None)

    async def _start(self, asked: Asked, *, daring: bool) -> bool:
        options = {**self._options(asked), **asked.arguments}
        self.doing = [asked]
        try:
            asked.moment = await during(asked.line, self.command(asked.command, **options))
        except QmpError as error:
            if not daring:
                raise
            self.count(f"refused: {error.desc.replace(asked.line.name, '')}")
            self.doing = []
            return False
        self.count("at an edge" if daring else "alone")
        return True

    async def grouped(self) -> None:
        """Backups of one or two disks that end together, or not; with bitmaps or without."""
        lines = [line for line in self.soak.lines if self.chance.random() < 0.8]
        # Always in the same order: nobody waits for somebody who waits.
        group: list[Asked] = []
        locks = [line.lock for line in lines]
        for lock in locks:
            await lock.acquire()
        claims = []
        try:
            failing = self.chance.random() < 0.3
            for line in lines:
                asked = await self._member(line, fails=failing and not group)
                if asked is not None:
                    group.append(asked)
                    claims.append(self.claim(asked))
                    await claims[-1].__aenter__()
            if not group:
                return
            completion = self.chance.choice(("grouped", "grouped", "individual"))
            finalize = {"auto-finalize": self.chance.random() < 0.6}
            actions = [
                {"type": asked.command, "data": {**self._options(asked), **asked.arguments, **finalize}}
                for asked in group
            ]
            self.doing = group
            looks = [asked.line.history.look(0, asked.line.sectors) for asked in group]
            await self.command("transaction", actions=actions, properties={"completion-mode": completion})
            for asked, look in zip(group, looks, strict=True):
                asked.moment = Look(0, [set(one) for one in look.seen])
                asked.line.history.give_up(look)
        finally:
            for lock in locks:
                lock.release()
        try:
            await self._see_through(group, grouped=completion == "grouped")
            self.count(f"{completion} group of {len(group)}")
        finally:
            for claim in claims:
                await claim.__aexit__(None, None, None)

    async def _member(self, line: Line, *, fails: bool) -> Asked | None:
        asked = await self.bitmap_backup(line, fails=fails) if self.chance.random() < 0.6 else None
        if asked is None:
            if not line.free((), (line.top,)):
                return None
            target = await asyncio.to_thread(line.new_image, None)
            await self._add_node(line, target, **(FULL if fails else {}))
            arguments = {"device": line.top, "target": target, "sync": "full"}
            asked = Asked(
                line, "blockdev-backup", arguments, target=target, made=target, at_start=True, together=(line.top,)
            )
        asked.fails = NO_SPACE if fails else ""
        return asked

    async def save(self, line: Line) -> None:
        """Begin anew to record: a full backup with a fresh bitmap, at one instant."""
        async with line.lock:
            if (line.saved is not None and (line.saved.busy or self.chance.random() < 0.7)) or not line.free(
                (), (line.top,)
            ):
                return
            if line.saved is not None:
                await self.command("block-dirty-bitmap-remove", node=line.saved.node, name=line.saved.name)
                self.lose_bitmap(line)
            target = await asyncio.to_thread(line.new_image, None)
            await self._add_node(line, target)
            arguments = {"device": line.top, "target": target, "sync": "full"}
            asked = Asked(
                line, "blockdev-backup", arguments, target=target, made=target, at_start=True, together=(line.top,)
            )
            bitmap = f"s{line.serial}"
            claim = self.claim(asked)
            await claim.__aenter__()
            node = line.top
            add = {"node": node, "name": bitmap, "granularity": 65536, "persistent": self.chance.random() < 0.5}
            actions = [
                {"type": "block-dirty-bitmap-add", "data": add},
                {"type": asked.command, "data": {**self._options(asked), **arguments}},
            ]
            self.doing = [asked]
            # Known, and busy, at once: a snapshot meanwhile takes the recording away.
            saved = line.saved = Saved(bitmap, node, target, busy=True)
            asked.moment = await during(line, self.command("transaction", actions=actions))
        try:
            line.kept.add(target)
            await self._see_through([asked])
        finally:
            await claim.__aexit__(None, None, None)
            saved.busy = False
        if line.saved is saved and asked.error is not None:
            line.saved = None
            await self.command("block-dirty-bitmap-remove", node=node, name=bitmap)

    def lose_bitmap(self, line: Line) -> None:
        line.saved = None
        self.count("bitmap lost")

    # -- a job's life ----------------------------------------------------------------------------------------------------------
    def _read_events(self) -> None:
        while self.qmp.events:
            event = self.qmp.events.popleft()
            data = event.get("data", {})
            for asked in self.doing:
                if event["event"] == "JOB_STATUS_CHANGE" and data["id"] == asked.id:
                    assert data["status"] in MOVES[Status(asked.status)], f"{asked}: -> {data['status']}"
                    asked.status = data["status"]
                elif event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") and data["device"] == asked.id:
                    asked.told_end = True
                    cancelled = event["event"] == "BLOCK_JOB_CANCELLED"
                    asked.told = "Operation canceled" if cancelled else data.get("error")

    async def _see_through(self, group: list[Asked], *, grouped: bool = False) -> None:
        steps, since = 0, time.monotonic()
        while not all(asked.over for asked in group):
            assert time.monotonic() - since < PATIENCE + 10, f"no end: {[str(asked) for asked in group]}"
            steps += 1
            await asyncio.sleep(self.chance.uniform(0, 0.02))
            await self.command("query-jobs")
            for asked in group:
                if not asked.over:
                    await self._step(asked, steps, group if grouped else [asked])
        for asked in group:
            await self._ended(asked)
        if grouped:
            assert len({asked.error is None for asked in group}) == 1, [(str(asked), asked.error) for asked in group]
        self.doing = []
        for asked in group:
            await self._settle(asked)

    async def _step(self, asked: Asked, steps: int, group: list[Asked]) -> None:
        if asked.status == "ready" and asked.end and self.chance.random() < 0.4:
            await self._end(asked)
        elif asked.status == "pending":
            if self.chance.random() < 0.5:
                await self._decide(asked, group)
        elif asked.endless and steps > 20:
            asked.endless = False
            await self._cancel(asked, group, "block-job-cancel", device=asked.id)
        elif steps > 60:
            await hurry(self.command, asked.id, mirrors=asked.command.endswith("mirror"))
        elif self.chance.random() < 0.3:
            await self._interfere(asked, group)

    async def _cancel(self, asked: Asked, group: list[Asked], command: str, **arguments: Any) -> None:
        for one in group:
            one.excused = "Operation canceled"
        try:
            await self.command(command, **arguments)
        except QmpError:
            await self.command("query-jobs")
            assert asked.status in ("aborting", "concluded", "null"), asked

    async def _decide(self, asked: Asked, group: list[Asked]) -> None:
        """It is pending. Its outcome is wanted, or not."""
        try:
            if self.chance.random() < 0.15:
                await self._cancel(asked, group, "job-cancel", id=asked.id)
            else:
                await self.command("job-finalize", id=asked.id)
                self.count("finalized")
        except QmpError:
            await self.command("query-jobs")
            assert asked.status != "pending", asked

    async def _interfere(self, asked: Asked, group: list[Asked]) -> None:
        step = self.chance.choice(("pause", "block pause", "speed", "change", "stop", "abort", "abort"))
        wanted = self.chance.choice(("background", "write-blocking"))
        try:
            if step == "pause":
                await self.command("job-pause", id=asked.id)
                await asyncio.sleep(self.chance.uniform(0, 0.05))
                await self.command("job-resume", id=asked.id)
            elif step == "block pause":
                await self.command("block-job-pause", device=asked.id)
                await asyncio.sleep(self.chance.uniform(0, 0.05))
                await self.command("block-job-resume", device=asked.id)
            elif step == "speed":
                await self.command(
                    "block-job-set-speed", device=asked.id, speed=self.chance.choice((0, 1 << 20, 16 << 20))
                )
            elif step == "change":
                await self.command("block-job-change", id=asked.id, type="mirror", copy_mode=wanted)
            elif step == "stop":
                await self.command("stop")
                await self.command("cont")
            elif self.chance.random() < 0.15 and asked.status != "ready":
                if self.chance.random() < 0.5:
                    await self._cancel(asked, group, "job-cancel", id=asked.id)
                else:
                    await self._cancel(asked, group, "block-job-cancel", device=asked.id, force=True)
        except QmpError:
            self.count(f"{step} refused")
        else:
            self.count(step)

    async def _end(self, asked: Asked) -> None:
        end, asked.end = asked.end, ""
        force = end == "cancel" and self.chance.random() < 0.2
        asked.excused = asked.excused or ("Operation canceled" if force else "")
        if end == "complete":
            # The base of an active commit, or the target.
            asked.pivot = asked.puts_on or asked.arguments["base-node"]
            asked.line.tops[asked.pivot] += 1
        asked.moment = await during(asked.line, self._end_now(asked, end, force=force))

    async def _end_now(self, asked: Asked, end: str, *, force: bool) -> None:
        try:
            if end == "complete":
                await self.command("job-complete", id=asked.id)
            else:
                await self.command("block-job-cancel", device=asked.id, force=force)
            while not asked.over:
                await asyncio.sleep(0.005)
                await self.command("query-jobs")
                if asked.status == "pending":
                    await self._decide(asked, [asked])
        except QmpError:
            assert asked.excused, asked

    async def _ended(self, asked: Asked) -> None:
        """It is over: what is told of it fits."""
        assert asked.told_end, f"{asked}: no event told its end"
        asked.error = asked.told
        jobs = await self.command("query-jobs")
        found = next((job for job in jobs if job["id"] == asked.id), None)
        assert (found is None) == asked.auto_dismiss, (str(asked), found)
        if found is not None:
            # Cancelled while it came to its end after a failure: the event says so, the error stays the first, as in QEMU.
            failed_first = bool(asked.excused and asked.fails) and found.get("error") == asked.fails
            assert found.get("error") == asked.told or failed_first, (str(asked), found, asked.told)
            await self.command(*self.chance.choice((("job-dismiss",), ("block-job-dismiss",))), id=asked.id)
            assert asked.status == "null", asked

    async def _settle(self, asked: Asked) -> None:
        """The model follows; the target is looked at; what is of no use any more is thrown away."""
        line = asked.line
        if asked.pivot:
            line.tops[asked.pivot] -= 1
        if asked.error is not None:
            excuses = {asked.fails, asked.excused, "Operation canceled" if asked.fails or asked.excused else ""}
            # A group's other member that was to fail fails this one.
            assert asked.error in excuses or asked.error == "Operation canceled", f"{asked}: {asked.error}"
            self.count(f"{asked.command} failed")
            if asked.bitmap is not None and asked.mode == "always":
                asked.bitmap.partial = asked.made
                line.kept.add(asked.made)
                await self.command("blockdev-del", node_name=asked.made)
            else:
                if asked.bitmap is not None and asked.bitmap.partial == asked.made:
                    # Its bits are still in the bitmap: the image is begun anew.
                    await self.command("blockdev-del", node_name=asked.made)
                elif asked.made:
                    await self._forget(line, asked.made)
            return
        assert not asked.fails, f"{asked}: it did not fail"
        self.count(" ".join(filter(None, (asked.command, asked.arguments.get("sync", ""), asked.mode))))
        # No await between the two: a snapshot may have come on top meanwhile.
        line.chain = [name for name in line.chain if name not in asked.removes]
        if asked.puts_on:
            line.chain.append(asked.puts_on)
        if line.saved is not None and line.saved.node != line.top:  # the guest went over to an image without it
            self.lose_bitmap(line)
        if asked.target and asked.moment is not None:
            await self._check_copy(asked)
        for name in reversed(asked.removes):  # what stands on others first
            await self._forget(line, name)
        if asked.made and asked.made not in line.chain and asked.made not in line.kept:
            await self._forget(line, asked.made)

    async def _check_copy(self, asked: Asked) -> None:
        """The target holds a moment of those that were seen."""
        line, target = asked.line, asked.target
        if asked.command.startswith("blockdev"):
            await self.command("blockdev-del", node_name=target)
        path, scratch = line.path(target), line.folder / f"read{self.number}"
        scratch.mkdir(exist_ok=True)
        data = await asyncio.to_thread(read_all, path, scratch, "-U")  # it may stand on an image of ours
        await asyncio.to_thread(run, ["qemu-img", "check", "-U", "-f", "qcow2", path])
        assert asked.moment is not None
        line.history.judge(asked.moment, data, f"{asked}: the target")
        self.count("copy checked")
        saved = asked.bitmap
        if saved is None or saved is not line.saved or asked.mode == "never":
            if saved is not None and saved.partial == target:
                # It is of this moment now, the bitmap of an earlier one, and what a failed backup took from that is here only.
                saved.image, saved.partial = target, ""
            return
        saved.image, saved.partial = target, ""
        line.kept.add(target)

    async def look_at(self, line: Line) -> None:
        """When nobody works on the disk: the chain on disk and that of nodes are the model's."""
        async with line.lock:
            if line.idle:
                await self._look_at(line)

    async def _look_at(self, line: Line) -> None:
        found = await asyncio.to_thread(line.on_disk, line.top)
        assert found == line.chain, f"the chain on disk is {found}, not {line.chain}"
        graph = await self.command("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        below = {edge["parent"]: edge["child"] for edge in graph["edges"] if edge["name"] in ("root", "backing")}
        wanted = f"d{line.name}"
        at = next(node["id"] for node in graph["nodes"] if node["type"] == "block-backend" and wanted in node["name"])
        opened: list[str] = []
        while (at := below.get(at)) is not None:
            opened.insert(0, names[at])
        assert opened == line.chain, f"the chain of nodes is {opened}, not {line.chain}"
        self.count("chain checked")


async def hurry(command: Callable[..., Awaitable[Any]], id: str, *, mirrors: bool) -> None:
    """Nothing may hold the job up any more; a mirror that does not catch up is helped as documented. It may be over by now."""
    try:
        await command("block-job-set-speed", device=id, speed=0)
        if mirrors:
            await command("block-job-change", id=id, type="mirror", copy_mode="write-blocking")
    except QmpError as error:
        if not any(words in str(error) for words in ("cannot accept command verb", "not found")):
            raise


async def during(line: Line, doing: Awaitable[Any]) -> Look:
    """Do it; what the guest's disk could show meanwhile."""
    look = line.history.look(0, line.sectors)
    try:
        await doing
        return Look(0, [set(one) for one in look.seen])
    finally:
        line.history.give_up(look)


@dataclass
class Soak:
    """One round: a daemon, its lines, its operators, and what these do often and rarely: backups of the guest's image leave no
    room for commits and mirrors of it, so that not every round has all."""

    daemon: Daemon
    lines: list[Line]
    chance: random.Random
    often: Sequence[str]
    rarely: Sequence[str]
    done: Counter[str] = field(default_factory=Counter)
    operators: list[Operator] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return any(line.clients.over for line in self.lines)

    def stop(self) -> None:
        for line in self.lines:
            line.clients.over = True
