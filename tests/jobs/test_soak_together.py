"""Several jobs at once, in every mode, on two disks that never rest: alone on parts of a chain that do not overlap, or in groups.

`test_soak.py` looks after one job at a time; here several operators, each with a monitor of its own, work on two disks (*lines*
of images) of one daemon: streams, commits, active commits, mirrors, backups (full, top, none, bitmap in every mode, one image
upon the other), transactions of snapshots, bitmaps and grouped backups with members that fail, snapshots and growth of disks that
jobs work on, speeds, pauses, copy modes, cancels of both kinds, jobs that wait to be finalized or dismissed, and then kill -9.

What is held against the model:

* the guests' reads, each at once (`SectorHistory`), and all data after a stop or a kill, as far as it was flushed;
* a backup's, a mirror's, or a whole chain of incremental backups' content is one moment of those between command and reply;
* an operator's claims (`soak_disks.Line`): a job on images that nobody else works on is never refused; one that shares no
  more than an edge with another may be, and changes nothing then;
* the chain by the headers and the chain of nodes, when nobody works on the disk;
* every job's moves are legal, the last one is null, its error is the one that its event told, members of a group end alike;
* ``qemu-img check`` (after a kill: leaks only).

The choices come from a seed, the timing does not. ``SOAK_SEED``, ``SOAK_SECONDS``: as in `test_soak.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Final

import pytest

from kit.clients import Clients
from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.soak_disks import Line
from kit.soak_operators import PATIENCE, Operator, Soak

OPERATORS: Final = 4
THEMES: Final = (
    ("stream", "commit", "stream"),
    ("active_commit", "mirror", "commit", "mirror"),
    ("backup", "stream", "grouped", "save", "backup"),
    ("grouped", "save", "bitmap_backup", "bitmap_backup"),
    ("stream", "commit", "active_commit", "mirror", "backup", "bitmap_backup", "grouped", "save"),
)


async def load(soak: Soak, *, seconds: float, kill: bool) -> None:
    """Clients and operators for that long; then everybody stops, or is stopped by the daemon's end."""
    for line in soak.lines:
        line.start_over()
    tasks = [asyncio.create_task(operator.work()) for operator in soak.operators]
    for line in soak.lines:
        seeds = [soak.chance.randrange(1 << 30) for _ in range(2)]
        tasks += [asyncio.create_task(line.clients.client(line.name, seeds[0], depth=2))]
        tasks += [asyncio.create_task(line.clients.client(line.name, seeds[1], depth=2, vanishing=True))]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    broken = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is not None]
    if kill and not broken:
        soak.daemon.kill()
    soak.stop()
    _, late = await asyncio.wait(tasks, timeout=2 * PATIENCE)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not (kill and not broken and isinstance(result, (OSError, EOFError))):
            raise result
    assert not late, "requests or commands without an answer"
    if not kill:
        for line in soak.lines:
            await soak.operators[0].look_at(line)
            assert line.idle


def one_round(lines: list[Line], folder: Path, chance: random.Random, *, seconds: float, kill: bool) -> Counter[str]:
    """Start, load, end; what was done."""
    options: list[str] = []
    for line in lines:
        for below, name in zip([None, *line.chain], line.chain, strict=False):
            file = {"driver": "file", "filename": str(line.path(name)), "discard": "unmap"}
            node = {"driver": "qcow2", "node-name": name, "file": file, "discard": "unmap", "backing": below}
            options += ["--blockdev", json.dumps(node | ({"read-only": True} if name != line.top else {}))]
        options += ["--device", f"virtio-blk,drive={line.top},id=d{line.name},share-rw=on"]
    sockets = [folder / f"m{number}" for number in range(OPERATORS)]
    for number, socket in enumerate(sockets):
        options += [
            "--chardev",
            f"socket,id=m{number},path={socket},server=on,wait=off",
            "--monitor",
            f"chardev=m{number}",
        ]
    with Daemon(folder, *options) as daemon, daemon.qmp(timeout=60) as first:
        for line in lines:
            first.execute(
                "block-export-add", type="nbd", id=line.name, node_name=f"d{line.name}", name=line.name, writable=True
            )
            line.clients = Clients(daemon, first, line.history, line.sectors)
            _forget_lost_bitmaps(first, line)
        soak = Soak(daemon, lines, chance, chance.choice(THEMES), sorted({*chain(*THEMES), "look_at"}))
        soak.operators = [Operator(soak, number, Qmp(socket, timeout=60)) for number, socket in enumerate(sockets)]
        try:
            asyncio.run(load(soak, seconds=seconds, kill=kill))
        except BaseException as error:
            for operator in soak.operators:
                error.add_note(f"operator {operator.number}: {[str(asked) for asked in operator.doing]}")
                error.add_note("    " + "\n    ".join(operator.log))
            error.add_note(f"chains {[line.chain for line in lines]}; layouts {[line.layout for line in lines]}")
            raise
        finally:
            for operator in soak.operators:
                operator.qmp.close()
        if not kill:
            daemon.stop(expect=0)
    for line in lines:
        for what, times in line.clients.done.items():
            soak.done[what] += times
    return soak.done


def _forget_lost_bitmaps(qmp: Qmp, line: Line) -> None:
    """After a restart only a persistent bitmap is left, and after a kill it knows that it is not to be trusted."""
    nodes = {node["node-name"]: node for node in qmp.execute("query-named-block-nodes")}
    found = {bitmap["name"]: bitmap for bitmap in nodes[line.top].get("dirty-bitmaps", [])}
    for name, bitmap in found.items():
        if line.saved is None or line.saved.name != name or bitmap.get("inconsistent"):
            qmp.execute("block-dirty-bitmap-remove", node=line.top, name=name)
    saved = line.saved
    if saved is not None and (
        saved.node != line.top or saved.name not in found or found[saved.name].get("inconsistent")
    ):
        line.saved = None
    elif saved is not None:
        saved.busy = False


def soak_lines(folder: Path, seed: int, rounds: int, seconds: float) -> Counter[str]:
    """Rounds on two disks, each going on with what the one before left."""
    chance, done = random.Random(seed), Counter[str]()
    lines = [Line(folder, name, chance) for name in "ab"]
    for number in range(rounds):
        kill = bool((seed + number) % 2)
        done += one_round(lines, folder, chance, seconds=seconds, kill=kill)
        for line in lines:
            line.ended(crashed=kill)
            needed = {*line.chain}
            if line.saved is not None:
                needed.update(line.on_disk(line.saved.partial or line.saved.image))
            for path in folder.glob(f"{line.name}[0-9]*.qcow2"):
                if path.stem not in needed:
                    path.unlink()
    return done


SEEDS = [int(os.environ["SOAK_SEED"])] if "SOAK_SEED" in os.environ else [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_jobs_side_by_side_lose_nothing(seed: int, short_path: Path) -> None:
    print(dict(sorted(soak_lines(short_path, seed, rounds=2, seconds=4).items())))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_jobs_side_by_side_lose_nothing_in_the_long_run(short_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "600"))
    done, seed = Counter[str](), int(os.environ.get("SOAK_SEED", str(random.randrange(1 << 20))))
    while time.monotonic() < deadline:
        print(f"seed {seed}", flush=True)
        done += soak_lines(short_path, seed, rounds=4, seconds=6)
        seed += 1
        for path in short_path.glob("*.qcow2"):
            path.unlink()
    print(dict(sorted(done.items())))
