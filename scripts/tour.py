"""The guided tour behind ``scripts/quickstart``: a disk that is snapshotted, backed up, shortened and moved while a client
writes, and not a byte is lost.

What happens, all of it real and on files in a temporary folder:

1. A chain of two qcow2 images is made, and ``livedisk daemon`` started on it: a virtio-blk device, a QMP socket, an
NBD server. 2. An embedded NBD client attaches to the guest's door and writes, zeroes, reads and compares without
pause. 3. Over QMP the disk is snapshotted live, several times. For each snapshot the tour notes what the disk held
at that moment. 4. The client stops and flushes. Every byte is compared: of the disk, and of every snapshot, each
through an export of its own. 5. The client writes again, and all four jobs run on its disk: a backup of one moment, a stream
and a commit that shorten the chain, a mirror that the disk goes over to. Every byte of the disk and of the backup is compared.
6. The daemon is killed with SIGKILL and started again from the files. Every byte is compared once more. 7. The client writes a
third time, through ``livedisk proxy``, while ``livedisk migrate`` moves its disk to a second daemon. All is compared there.

Exit code 0 only if all of it held.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from livedisk.emulator.cli.figures import bar, human_bytes
from livedisk.emulator.drivers.qcow2.create import CreateOptions, create_file
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient
from livedisk.nbd.client import NbdClient

BLOCK: Final = 4096
STEP: Final = 1 << 20
JOB: Final = "job0"
LIVEDISK: Final = str(Path(sys.executable).with_name("livedisk"))
_CONTENT = struct.Struct("<QQ")


class TourFailed(Exception):
    """Something did not hold. The text says what."""


def content_of(block: int, number: int) -> bytes:
    """What write ``number`` leaves in ``block``: both numbers, over and over; number 0 is zeroes."""
    return bytes(BLOCK) if number == 0 else _CONTENT.pack(block, number) * (BLOCK // _CONTENT.size)


@dataclass
class Moment:
    """What the disk may hold in a snapshot: per block the write that was acknowledged before the command was sent,
    or one of those that were under way or came while it ran."""

    node: str
    certain: array[int]
    possible: dict[int, set[int]]

    def allows(self, block: int, number: int) -> bool:
        return number == self.certain[block] or number in self.possible.get(block, ())


class Client:
    """The embedded client: ``depth`` requests in flight at random, at most one on a block, and the model they are
    checked with."""

    def __init__(self, nbd: NbdClient, depth: int, seed: int, model: array[int] | None = None) -> None:
        self.nbd = nbd
        self.blocks = nbd.info.size // BLOCK
        self.model = array("Q", bytes(8 * self.blocks)) if model is None else model
        self.written = self.verified = 0
        self._depth = depth
        self._random = random.Random(seed)
        self._numbers = max(self.model)
        self._under_way: dict[int, int | None] = {}
        self._moments: list[Moment] = []
        self._running = True

    async def run(self) -> None:
        """Keep going until `stop`, then wait for what is in flight and flush. Raises OSError or `TourFailed`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._depth):
                group.create_task(self._requests())
        await self.nbd.flush()

    def stop(self) -> None:
        self._running = False

    async def _requests(self) -> None:
        while self._running:
            block = self._random.randrange(self.blocks)
            if block in self._under_way:
                continue
            choice = self._random.random()
            if choice < 0.3:
                await self._read(block)
            else:
                await self._write(block, zeroes=choice > 0.95)

    async def _read(self, block: int) -> None:
        self._under_way[block] = None
        data = await self.nbd.read(block * BLOCK, BLOCK)
        if data != content_of(block, self.model[block]):
            raise TourFailed(f"block {block} does not read back as it was written")
        del self._under_way[block]
        self.verified += BLOCK

    async def _write(self, block: int, *, zeroes: bool) -> None:
        if not zeroes:
            self._numbers += 1
        number = 0 if zeroes else self._numbers
        self._under_way[block] = number
        for moment in self._moments:
            moment.possible.setdefault(block, set()).add(number)
        if zeroes:
            await self.nbd.write_zeroes(block * BLOCK, BLOCK)
        else:
            await self.nbd.write(block * BLOCK, content_of(block, number))
        self.model[block] = number
        del self._under_way[block]
        self.written += BLOCK

    @contextlib.contextmanager
    def moment(self, node: str) -> Any:
        """Note what the disk may hold if it is frozen between here and the end of the block."""
        possible = {block: {number} for block, number in self._under_way.items() if number is not None}
        moment = Moment(node, self.model[:], possible)
        self._moments.append(moment)
        try:
            yield moment
        finally:
            self._moments.remove(moment)


@dataclass
class Screen:
    """What is shown: the chain, figures, and the latest events. On a terminal it is drawn over and over, elsewhere
    printed as lines."""

    console: Console
    chain: list[str] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    job: str = ""
    lines: list[Text] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def tell(self, text: str, style: str = "") -> None:
        line = Text.assemble((f"{time.monotonic() - self.started:5.1f} s  ", "dim"), (text, style))
        self.lines.append(line)
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)

    def __rich__(self) -> Panel:
        boxes = Text("  ⟵  ").join(
            Text(f" {name} ", "reverse bold cyan" if name == self.chain[-1] else "reverse blue") for name in self.chain
        )
        figures = Table.grid(padding=(0, 3))
        figures.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in self.figures.items()))
        height = max(6, self.console.height - 14)
        return Panel(
            Group(
                Text("the guest writes to the right-most image; the others are frozen\n", "dim"),
                boxes,
                Text(""),
                figures,
            )
            if not self.lines
            else Group(boxes, Text(""), figures, Text(self.job, "yellow"), *self.lines[-height:]),
            title="livedisk: a disk in use",
            border_style="cyan",
        )


@dataclass
class Daemon:
    """A running ``livedisk daemon``; its sockets lie in a folder with a short path."""

    process: asyncio.subprocess.Process
    qmp: QmpClient
    nbd_socket: str

    @classmethod
    async def start(cls, folder: Path, top: Path, node: str) -> Daemon:
        """Serve the image ``top`` as the guest's disk, its node named ``node``. Raises `TourFailed` with what the
        daemon printed if it does not come up."""
        disk = [
            *("--blockdev", f"driver=qcow2,node-name={node},file.driver=file,file.filename={top}"),
            *("--device", f"virtio-blk,drive={node},id=virtio0"),
        ]
        daemon = await cls._launch(folder, [*disk, "--nbd-server", f"addr.type=unix,addr.path={folder / 'nbd'}"])
        await daemon.qmp.call("nbd-server-add", {"device": "virtio0", "name": "guest", "writable": True})
        return daemon

    @classmethod
    async def start_waiting(cls, folder: Path) -> Daemon:
        """A daemon that waits for a guest from elsewhere. Raises `TourFailed`."""
        folder.mkdir()
        return await cls._launch(folder, ["-incoming", "defer"])

    @classmethod
    async def _launch(cls, folder: Path, options: list[str]) -> Daemon:
        qmp_socket, nbd_socket = folder / "qmp", folder / "nbd"
        log = folder / "daemon.log"
        for path in (qmp_socket, nbd_socket):
            path.unlink(missing_ok=True)
        command = [
            *(LIVEDISK, "daemon", *options),
            *("-qmp", f"unix:{qmp_socket},server=on,wait=off"),
            *("-qmp", f"unix:{qmp_socket}-2,server=on,wait=off"),
        ]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            qmp = await _connected(process, qmp_socket)
        except BaseException as error:
            await _ended(process)
            if isinstance(error, Exception):
                raise TourFailed(f"livedisk daemon did not start: {error}\n{log.read_text()}") from error
            raise
        return cls(process, qmp, str(nbd_socket))

    async def kill(self) -> None:
        """SIGKILL: the daemon gets no chance to tidy up."""
        await self.qmp.close()
        await _ended(self.process)

    async def quit(self) -> None:
        """End in order. Raises `TourFailed` if the daemon does not end well."""
        await self.qmp.call("quit")
        await self.qmp.close()
        if code := await asyncio.wait_for(self.process.wait(), 10):
            raise TourFailed(f"livedisk daemon ended with exit code {code}")

    @contextlib.asynccontextmanager
    async def client(self, export: str) -> AsyncIterator[NbdClient]:
        client = await NbdClient.connect_unix(self.nbd_socket, export)
        try:
            yield client
        finally:
            client.abort()


async def _connected(process: asyncio.subprocess.Process, path: Path) -> QmpClient:
    for _ in range(1000):
        with contextlib.suppress(ConnectionLost):
            return await QmpClient.connect(str(path))
        if process.returncode is not None:
            raise TourFailed(f"exit code {process.returncode}")
        await asyncio.sleep(0.01)
    raise TourFailed(f"nobody listens on {path}")


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextlib.asynccontextmanager
async def helper(log: Path, *arguments: str) -> AsyncIterator[None]:
    """A command of ours that runs meanwhile; what it says goes to ``log``."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            LIVEDISK, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        await _ended(process)


async def _attached(socket: Path) -> NbdClient:
    """A client of the guest's export at a socket that is about to be there. Raises `TourFailed`."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            return await NbdClient.connect_unix(str(socket), "guest")
        await asyncio.sleep(0.01)
    raise TourFailed(f"nobody listens on {socket}")


async def contents(nbd: NbdClient) -> AsyncIterator[tuple[int, int]]:
    """``(block, number)`` of every block of an export. Raises `TourFailed` for one that no write can have left."""
    for offset in range(0, nbd.info.size, STEP):
        data = await nbd.read(offset, STEP)
        for at in range(0, STEP, BLOCK):
            block = (offset + at) // BLOCK
            found = data[at : at + BLOCK]
            number = _CONTENT.unpack_from(found)[1]
            if found != content_of(block, number):
                raise TourFailed(f"block {block} is torn, or another block's")
            yield block, number


class Tour:
    """The tour's acts, in order. Images lie in ``folder``, sockets in ``run_folder``; ``seconds`` is how long the
    client writes, ``snapshots`` how many are taken meanwhile."""

    def __init__(
        self, folder: Path, run_folder: Path, screen: Screen, size: int, snapshots: int, seconds: float
    ) -> None:
        self.folder = folder
        self.run_folder = run_folder
        self.screen = screen
        self.size = size
        self.snapshots = snapshots
        self.seconds = seconds
        self.moments: list[Moment] = []
        self.backup: Moment
        self._began = 0.0

    def image(self, number: int) -> Path:
        return self.folder / f"disk-{number}.qcow2"

    async def run(self) -> None:
        """All acts. Raises `TourFailed` as soon as something does not hold."""
        await self.make_chain()
        daemon = await Daemon.start(self.run_folder, self.image(1), "disk-1")
        try:
            self.screen.tell("livedisk daemon runs: a virtio-blk device, QMP, and the guest's door over NBD", "green")
            model = await self.write_and_snapshot(daemon)
            await self.verify(daemon, "guest", "the disk", model)
            await self.verify_snapshots(daemon)
            model = await self.run_jobs(daemon, model)
            await self.verify(daemon, "guest", "the disk, where it is now", model)
            await self.verify_moment(daemon, self.backup, "the backup")
            await daemon.kill()
            self.screen.tell("kill -9 of the daemon, and again from the files", "yellow")
            daemon = await Daemon.start(self.run_folder, self.folder / "moved.qcow2", "again")
            await self.verify(daemon, "guest", "the disk after the kill", model)
            await self.migrate(daemon, model)
            await daemon.quit()
        finally:
            await _ended(daemon.process)

    async def make_chain(self) -> None:
        """Two images, the upper one on the lower: what the guest starts on."""
        base = self.image(0)
        await create_file(str(base), CreateOptions(size=self.size))
        await create_file(
            str(self.image(1)), CreateOptions(size=self.size, backing_file=str(base), backing_fmt="qcow2")
        )
        self.screen.chain = ["disk-0", "disk-1"]
        self.screen.tell(f"made a chain of two qcow2 images of {self.size >> 20} MiB in {self.folder}")

    async def write_and_snapshot(self, daemon: Daemon) -> array[int]:
        """The client writes; meanwhile the snapshots are taken. Returns what the disk holds in the end."""
        async with daemon.client("guest") as nbd:
            client = Client(nbd, depth=16, seed=1)
            async with asyncio.TaskGroup() as group:
                group.create_task(client.run())
                figures = group.create_task(self.show_figures(client))
                self.screen.tell("the client writes, zeroes, reads and compares without pause")
                pause = self.seconds / (self.snapshots + 1)
                for number in range(2, self.snapshots + 2):
                    await asyncio.sleep(pause)
                    await self.snapshot(daemon, client, number)
                await asyncio.sleep(pause)
                client.stop()
                figures.cancel()
            self.screen.tell("the client stopped and flushed")
            return client.model

    async def snapshot(self, daemon: Daemon, client: Client, number: int) -> None:
        below, above = f"disk-{number - 1}", f"disk-{number}"
        written, started = client.written, time.perf_counter()
        with client.moment(below) as moment:
            await daemon.qmp.call(
                "blockdev-snapshot-sync",
                {
                    "node-name": below,
                    "snapshot-node-name": above,
                    "snapshot-file": str(self.image(number)),
                    "format": "qcow2",
                },
            )
        took = (time.perf_counter() - started) * 1000
        self.moments.append(moment)
        self.screen.chain.append(above)
        during = (client.written - written) // BLOCK
        self.screen.tell(f"blockdev-snapshot-sync {below} ⟵ {above}: {took:.0f} ms, {during} writes meanwhile", "cyan")

    async def show_figures(self, client: Client) -> None:
        before, then = 0, time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            done = (client.written + client.verified) // BLOCK
            self.screen.figures = {
                "written": f"{client.written / 1e6:.0f} MB",
                "read and compared": f"{client.verified / 1e6:.0f} MB",
                "requests/s": f"{(done - before) / (now - then):.0f}",
            }
            before, then = done, now

    async def verify(self, daemon: Daemon, export: str, what: str, model: array[int]) -> None:
        """Every byte of an export is what the model says."""
        async with daemon.client(export) as nbd:
            async for block, number in contents(nbd):
                if number != model[block]:
                    raise TourFailed(f"{what}: block {block} holds write {number}, not {model[block]}")
        self.screen.tell(f"verified {what}: all {self.size >> 20} MiB as written", "green")

    async def verify_snapshots(self, daemon: Daemon) -> None:
        """Every frozen image is the disk of its moment, seen through an export of its own."""
        for moment in self.moments:
            await self.verify_moment(daemon, moment, f"snapshot {moment.node}")

    async def verify_moment(self, daemon: Daemon, moment: Moment, what: str) -> None:
        """A node is the disk of its moment."""
        await daemon.qmp.call("nbd-server-add", {"device": moment.node, "name": moment.node})
        async with daemon.client(moment.node) as nbd:
            async for block, number in contents(nbd):
                if not moment.allows(block, number):
                    raise TourFailed(f"{what}: block {block} holds write {number}, not of its moment")
        await daemon.qmp.call("nbd-server-remove", {"name": moment.node, "mode": "hard"})
        self.screen.tell(f"verified {what}: all {self.size >> 20} MiB of its moment", "green")

    # -- the jobs ------------------------------------------------------------------------------------------------------
    async def run_jobs(self, daemon: Daemon, model: array[int]) -> array[int]:
        """The client writes on; meanwhile backup, stream, commit and mirror run. Returns what the disk holds in the end."""
        async with daemon.client("guest") as nbd:
            client = Client(nbd, depth=16, seed=2, model=model)
            async with asyncio.TaskGroup() as group:
                group.create_task(client.run())
                figures = group.create_task(self.show_figures(client))
                self.screen.tell("the client writes again, and now every job runs on its disk")
                await self.back_up(daemon, client)
                await self.shorten(daemon)
                await self.move(daemon)
                client.stop()
                figures.cancel()
            self.screen.tell("the client stopped and flushed")
            return client.model

    async def back_up(self, daemon: Daemon, client: Client) -> None:
        """A copy of one moment: that of the command."""
        await self.open_target(daemon, "backup")
        with client.moment("backup") as self.backup:
            await self.begin(daemon, "blockdev-backup", device=self.screen.chain[-1], target="backup", sync="full")
        await self.ended(daemon, "backup of the whole disk, as it was at one moment")

    async def shorten(self, daemon: Daemon) -> None:
        """A stream takes the image below the top out of the chain, a commit all between the new neighbour and the base."""
        chain = self.screen.chain
        await self.begin(daemon, "block-stream", device=chain[-1], base=str(self.folder / f"{chain[-3]}.qcow2"))
        await self.ended(daemon, f"stream: {chain[-2]} into {chain[-1]}")
        del chain[-2]
        names = {name: str(self.folder / f"{node}.qcow2") for name, node in (("top", chain[-2]), ("base", chain[0]))}
        await self.begin(daemon, "block-commit", device=chain[-1], **names)
        await self.ended(daemon, f"commit: all down from {chain[-2]} into {chain[0]}")
        del chain[1:-1]

    async def move(self, daemon: Daemon) -> None:
        """A mirror catches up with the client; then the client's disk is the copy, from one request to the next."""
        await self.open_target(daemon, "moved")
        await self.begin(daemon, "blockdev-mirror", device=self.screen.chain[-1], target="moved", sync="full", speed=0)
        asked = time.monotonic()
        while not (job := await self.look(daemon)) or not job["ready"]:
            if time.monotonic() - asked > 2 and job:
                # The client may write as fast as anybody can copy: let its writes reach both.
                change = {"id": JOB, "type": "mirror", "copy-mode": "write-blocking"}
                await daemon.qmp.call("block-job-change", change)
                asked = float("inf")
            await asyncio.sleep(0.05)
        await daemon.qmp.call("job-complete", {"id": JOB})
        await self.ended(daemon, "mirror: caught up, and the disk went over to the copy")
        self.screen.chain[:] = ["moved"]

    # -- the migration -------------------------------------------------------------------------------------------------
    async def migrate(self, source: Daemon, model: array[int]) -> None:
        """The client writes on, through a proxy; meanwhile its disk goes to another daemon, with one command."""
        there = self.run_folder / "there"
        destination = await Daemon.start_waiting(there)
        try:
            places = [f"nbd+unix:///guest?socket={folder / 'nbd'}" for folder in (self.run_folder, there)]
            door = self.run_folder / "door"
            async with helper(self.run_folder / "proxy.log", "proxy", "--socket", str(door), *places):
                nbd = await _attached(door)
                try:
                    client = Client(nbd, depth=16, seed=3, model=model)
                    async with asyncio.TaskGroup() as group:
                        group.create_task(client.run())
                        figures = group.create_task(self.show_figures(client))
                        self.screen.tell("the client writes a third time, and its disk goes to another daemon")
                        await self.hand_over(there)
                        client.stop()
                        figures.cancel()
                finally:
                    nbd.abort()
            self.screen.chain[:] = ["migrated"]
            destination = Daemon(destination.process, destination.qmp, str(there / "nbd"))
            await self.verify(destination, "guest", "the disk on the other daemon", client.model)
            await destination.quit()
        finally:
            await _ended(destination.process)

    async def hand_over(self, there: Path) -> None:
        """``livedisk migrate``. Raises `TourFailed` with what it printed if it fails."""
        (self.folder / "there").mkdir(exist_ok=True)
        command = ["migrate", "--from", f"{self.run_folder / 'qmp'}-2", "--to", f"{there / 'qmp'}-2"]
        command += ["--target", str(self.folder / "there"), "--nbd", f"unix:{there / 'nbd'}"]
        process = await asyncio.create_subprocess_exec(
            LIVEDISK, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        printed = (await process.communicate())[0].decode()
        if process.returncode:
            raise TourFailed(f"livedisk migrate ended with exit code {process.returncode}: {printed}")
        self.screen.tell(f"livedisk migrate: {printed.strip().splitlines()[-1]}", "cyan")

    async def open_target(self, daemon: Daemon, name: str) -> None:
        path = self.folder / f"{name}.qcow2"
        await create_file(str(path), CreateOptions(size=self.size))
        file = {"driver": "file", "filename": str(path)}
        await daemon.qmp.call("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file})

    async def begin(self, daemon: Daemon, command: str, **arguments: object) -> None:
        """Start a job, slow enough to be seen."""
        self._began = time.perf_counter()
        await daemon.qmp.call(command, {"job-id": JOB, "speed": self.size // 2, **arguments})

    async def look(self, daemon: Daemon) -> dict[str, Any] | None:
        """What the job does now, for the screen, too; None once it is over."""
        jobs: list[dict[str, Any]] = await daemon.qmp.call("query-block-jobs")
        job = next((job for job in jobs if job["device"] == JOB), None)
        if job is not None:
            share = job["offset"] / job["len"] if job["len"] else 0.0
            self.screen.job = f"{job['type']:<7} {bar(share, 40, '█░')} {share:4.0%}  {job['status']}"
        return job

    async def ended(self, daemon: Daemon, what: str) -> None:
        """Wait for the job's end. Raises `TourFailed` if it failed."""
        waiting = asyncio.create_task(daemon.qmp.wait_event("BLOCK_JOB_COMPLETED", device=JOB))
        while not waiting.done():
            await self.look(daemon)
            await asyncio.wait([waiting], timeout=0.1)
        done = waiting.result()["data"]
        if "error" in done:
            raise TourFailed(f"{what}: {done['error']}")
        while await self.look(daemon):
            await asyncio.sleep(0.01)
        self.screen.job = ""
        took = time.perf_counter() - self._began
        self.screen.tell(f"{what}: {human_bytes(done['len'])}, {took:.1f} s", "cyan")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0.5),
    help="How long the client writes while snapshots are taken.",
)
@click.option("--snapshots", default=4, show_default=True, type=click.IntRange(2, 30), help="Live snapshots meanwhile.")
@click.option("--size", default=64, show_default=True, type=click.IntRange(1, 4096), help="MiB of the disk.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Make the images in this folder and keep them."
)
def main(seconds: float, snapshots: int, size: int, keep: Path | None) -> None:
    """Snapshot a disk, back it up, shorten its chain and move it while a client writes, and verify every byte."""
    console = Console(highlight=False)
    screen = Screen(console)
    with tempfile.TemporaryDirectory(prefix="livedisk-", dir="/tmp") as scratch:
        folder = Path(scratch) if keep is None else keep.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tour = Tour(folder, Path(scratch), screen, size << 20, snapshots, seconds)
        with Live(screen, console=console, refresh_per_second=8) if console.is_terminal else contextlib.nullcontext():
            failure = asyncio.run(outcome(tour))
        if failure is not None:
            console.print(f"FAILED: {failure}", style="bold red")
            raise SystemExit(1)
    told = f"Nothing was lost: {snapshots} snapshots, four jobs and a migration under load, one kill -9, every byte verified."
    console.print(told, style="bold green")
    console.print("Next: livedisk --help lists the commands, and each has a --help of its own (in .quickstart/bin).")


async def outcome(tour: Tour) -> BaseException | None:
    """Run the tour; None if everything held, else the error that ended it."""
    try:
        await tour.run()
    except (TourFailed, OSError, LiveDiskError, ExceptionGroup) as failure:
        return _first(failure)
    return None


def _first(error: BaseException) -> BaseException:
    """A task group wraps what went wrong in it, perhaps more than once."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
