"""``livedisk jobs``: what the jobs of a daemon do, for people: a line a job, and what to do where one waits for somebody.

Rates and the time that is left come from two looks at a job. A mirror's work grows while the guest writes, so its time is
what is left by what it gains on the guest; where it gains nothing, that is said, and the ways out. Source of all figures:
query-jobs and query-block-jobs, so QEMU's jobs are shown as well.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import click

from livedisk.emulator.cli.figures import bar, duration, human_bytes
from livedisk.emulator.qmp.client import ConnectionLost, QmpClient, QmpError

HELP = """Show the jobs of the daemon whose QMP socket is SOCKET: a line a job with a bar, the bytes done and to do, the
rate, the time left and the state, and below it why it failed or what it waits for.

SOCKET is written as for 'livedisk qmp' and may be livedisk's, QEMU's or qemu-storage-daemon's. A QMP socket serves one
client at a time: if another is connected, this command ends with exit code 1 after --timeout. Give the daemon a second
-qmp option to look at it beside another client.

\b
With --watch the lines are drawn again and again until Ctrl-C, or until the daemon ends; if the output is no terminal,
they are printed again and again, with the events of the jobs between them. With --wait it ends when no job works any
more: each is over, or waits for somebody (ready, pending, concluded, paused).

\b
With --json the jobs are one JSON list (with --watch and --wait one a look, each on a line of its own). Members beside those
of query-block-jobs: "rate" (bytes a second, or null), "seconds-left" (or null), "converges" (false where a mirror does
not gain on the guest), "advice" (a list of commands that may come next).

\b
Examples:
  livedisk jobs disk.qmp
  livedisk jobs disk.qmp --watch
  livedisk jobs disk.qmp --json | jq '.[].status'
  livedisk jobs disk.qmp --wait && livedisk qmp disk.qmp job-complete id=mirror0

\b
Exit status:
  0  the jobs were shown; with --wait: none failed
  1  the daemon could not be asked; with --wait: a job failed or was cancelled
  2  the command line could not be understood
"""

FIRST_LOOK: Final = 0.4
"""Seconds between the two looks of a single answer."""
_WORKING: Final = frozenset({"created", "running", "waiting", "aborting"})

Job = dict[str, Any]


@dataclass
class Progress:
    """How a job came along between two looks. ``rate``: bytes a second, None before the second look; ``growth``: by how much
    its work grew in a second."""

    rate: float | None = None
    growth: float = 0.0

    def seconds_left(self, job: Job) -> float | None:
        """None where it cannot be told."""
        gain = (self.rate or 0.0) - self.growth
        left = _total(job) - _done(job)
        if not left:
            return 0.0
        return left / gain if gain > 0 else None

    def converges(self, job: Job) -> bool:
        """Whether the work gets less: only what grows while it is done may not."""
        return not (self.growth > 0 and self.rate is not None and self.growth >= self.rate and _total(job) > _done(job))


@dataclass
class Watch:
    """What was seen of the jobs so far."""

    jobs: list[Job] = field(default_factory=list)
    progress: dict[str, Progress] = field(default_factory=dict)
    _then: float = 0.0

    async def look(self, client: QmpClient) -> None:
        """Ask for the jobs. Raises QmpError, ConnectionLost."""
        before, then = {job["id"]: job for job in self.jobs}, self._then
        self.jobs, self._then = await _ask(client), time.monotonic()
        seconds = self._then - then
        for job in self.jobs:
            old = before.get(job["id"])
            if old is not None and old["type"] == job["type"] and seconds > 0:
                rate = max(0.0, _done(job) - _done(old)) / seconds
                growth = max(0.0, _total(job) - _total(old)) / seconds
                last = self.progress.get(job["id"], Progress())
                if last.rate is not None:  # jobs work in bursts: show what is usual
                    rate, growth = (rate + 2 * last.rate) / 3, (growth + 2 * last.growth) / 3
                self.progress[job["id"]] = Progress(rate, growth)
        for gone in set(before) - {job["id"] for job in self.jobs}:
            self.progress.pop(gone, None)

    @property
    def working(self) -> bool:
        """Whether a job does something that needs nobody."""
        return any(job["status"] in _WORKING and not job.get("paused") for job in self.jobs)

    def described(self) -> list[Job]:
        """The jobs as ``--json`` tells them."""
        return [self._described(job) for job in self.jobs]

    def _described(self, job: Job) -> Job:
        progress = self.progress.get(job["id"], Progress())
        left = progress.seconds_left(job) if progress.rate is not None else None
        return {
            **job,
            "rate": None if progress.rate is None else round(progress.rate),
            "seconds-left": None if left is None else round(left, 1),
            "converges": progress.converges(job),
            "advice": [command for _, command in advice(job, progress)],
        }

    def lines(self, width: int, marks: str = "#-") -> Iterator[str]:
        """As a person reads them. ``width``: columns of the terminal; ``marks``: what the full and the empty part of a bar are
        made of."""
        if not self.jobs:
            yield "no jobs"
        longest = max((len(job["id"]) for job in self.jobs), default=0)
        for job in self.jobs:
            progress = self.progress.get(job["id"], Progress())
            yield _line(job, progress, longest, width, marks)
            if job.get("error"):
                yield f"    failed: {job['error']}"
            for reason, command in advice(job, progress):
                yield f"    {reason}: {command}"


def _done(job: Job) -> int:
    return int(job["offset"] if "offset" in job else job["current-progress"])


def _total(job: Job) -> int:
    return int(job["len"] if "len" in job else job["total-progress"])


async def _ask(client: QmpClient) -> list[Job]:
    """All jobs, the oldest first; those on block nodes with what query-block-jobs tells of them."""
    jobs: list[Job] = await client.execute("query-jobs")
    block = {job["device"]: job for job in await client.execute("query-block-jobs")}
    return [{**job, **block.get(job["id"], {})} for job in reversed(jobs)]


def _line(job: Job, progress: Progress, longest: int, width: int, marks: str) -> str:
    done, total = _done(job), _total(job)
    state = "paused" if job.get("paused") and job["status"] not in ("paused", "standby") else job["status"]
    words = [f"{job['id']:<{longest}}", f"{job['type']:<8}", f"{state:<9}"]
    figures = [f"{100 * done // total if total else 100 if job.get('ready') else 0:3d} %"]
    figures.append(f"{human_bytes(done)} of {human_bytes(total)}")
    if job["status"] == "running" and progress.rate is not None:
        figures.append(f"{human_bytes(progress.rate)}/s")
        seconds = progress.seconds_left(job)
        figures.append(f"ETA {duration(seconds)}" if seconds is not None else "ETA unknown")
    if job.get("speed"):
        figures.append(f"limit {human_bytes(job['speed'])}/s")
    left, right = "  ".join(words), "  ".join(figures)
    share = done / total if total else float(job.get("ready", False))
    return "  ".join([left, bar(share, max(8, min(30, width - len(left) - len(right) - 4)), marks), right])


def advice(job: Job, progress: Progress) -> Iterator[tuple[str, str]]:
    """What the job waits for, or would help it, and the command."""
    name, status = job["id"], job["status"]
    if job.get("io-status", "ok") != "ok":
        cause = "no space is left" if job["io-status"] == "nospace" else "a request failed"
        yield f"stopped, because {cause}; when that is mended", f"job-resume id={name}"
        yield "or give up", f"job-cancel id={name}"
    elif status in ("paused", "standby") or job.get("paused"):
        yield "paused; go on", f"job-resume id={name}"
    elif status == "ready":
        where = "the base" if job["type"] == "commit" else "the target"
        yield f"it has caught up; take the guest over to {where}", f"job-complete id={name}"
        yield "or leave the guest where it is", f"block-job-cancel device={name}"
    elif status == "pending":
        yield "it has done its work; make it real", f"job-finalize id={name}"
        yield "or undo it", f"job-cancel id={name}"
    elif status == "concluded":
        yield "it is over; forget it", f"job-dismiss id={name}"
    elif status == "running" and not progress.converges(job):
        yield (
            "the guest writes as fast as it copies; let writes wait for the target",
            f"block-job-change id={name} type=mirror copy-mode=write-blocking",
        )
    if status == "running" and job.get("speed"):
        yield "held back by its limit; lift it", f"block-job-set-speed device={name} speed=0"


@asynccontextmanager
async def connected(address: str, timeout: float) -> AsyncIterator[QmpClient]:
    """A connection to a monitor. Raises ConnectionLost, which says so if somebody else holds it."""
    async with await QmpClient.connect(address, timeout=timeout) as client:
        yield client


@click.command("jobs", help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("socket")
@click.option("-w", "--watch", is_flag=True, help="Look again and again, until Ctrl-C or the daemon's end.")
@click.option("--wait", is_flag=True, help="Look again and again, until no job works any more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--interval",
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0.05),
    help="Between two looks.",
)
@click.option(
    "--timeout",
    default=3.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0.05),
    help="How long to wait for the daemon's greeting.",
)
def jobs(socket: str, watch: bool, wait: bool, as_json: bool, interval: float, timeout: float) -> None:
    if watch and wait:
        raise click.UsageError("--watch and --wait exclude each other")
    try:
        status = asyncio.run(_run(socket, watch or wait, wait, as_json, interval, timeout))
    except KeyboardInterrupt:
        status = 0 if watch else 130
    except (ConnectionLost, QmpError) as error:
        click.echo(f"livedisk: {error}", err=True)
        status = 1
    except BrokenPipeError:
        sys.stdout = None  # whoever read has seen enough
        status = 0
    sys.exit(status)


async def _run(address: str, repeat: bool, wait: bool, as_json: bool, interval: float, timeout: float) -> int:
    async with connected(address, timeout) as client:
        watch = Watch()
        await watch.look(client)
        if not repeat:
            if watch.working:
                await asyncio.sleep(FIRST_LOOK)
                await watch.look(client)
            click.echo(json.dumps(watch.described()) if as_json else "\n".join(watch.lines(_width())))
            return 0
        news = News(client)
        try:
            if sys.stdout.isatty() and not as_json:
                await _draw(client, watch, news, wait, interval)
            else:
                await _print(client, watch, news, wait, as_json, interval)
        except ConnectionLost:
            if wait:
                raise
            click.echo("the daemon has ended", err=True)
            return 0
        finally:
            news.close()
        return 1 if wait and (news.failed or any(job.get("error") for job in watch.jobs)) else 0


class News:
    """The events of jobs, as lines, from a task of its own."""

    def __init__(self, client: QmpClient) -> None:
        self.lines: list[str] = []
        self.failed = False
        self._task = asyncio.get_running_loop().create_task(self._listen(client))

    def close(self) -> None:
        self._task.cancel()

    def take(self) -> list[str]:
        """What has come since the last call."""
        lines, self.lines = self.lines, []
        return lines

    async def _listen(self, client: QmpClient) -> None:
        async for event in client.events():
            name, data = event["event"], event.get("data", {})
            if not name.startswith("BLOCK_JOB_"):
                continue
            job = data.get("device", data.get("id"))
            what = name.removeprefix("BLOCK_JOB_").lower()
            if name == "BLOCK_JOB_ERROR":
                self.lines.append(f"{job}: a {data['operation']} failed; what the policy says: {data['action']}")
            elif "error" in data:
                self.lines.append(f"{job}: failed: {data['error']}")
            else:
                self.lines.append(f"{job}: {what}, {human_bytes(data['len'])}" if data.get("len") else f"{job}: {what}")
            self.failed = self.failed or "error" in data or name == "BLOCK_JOB_CANCELLED"


async def _draw(client: QmpClient, watch: Watch, news: News, wait: bool, interval: float) -> None:
    """On a terminal: the lines over and over in the same place, news above them."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            for line in news.take():
                live.console.print(Text(line, "red" if "failed" in line else "cyan"))
            live.update(Text("\n".join(watch.lines(console.width - 1, "█░")), no_wrap=True), refresh=True)
            if wait and not watch.working:
                return
            await asyncio.sleep(interval)
            await watch.look(client)


async def _print(client: QmpClient, watch: Watch, news: News, wait: bool, as_json: bool, interval: float) -> None:
    """Elsewhere: what changed since the last look, news first."""
    shown = ""
    while True:
        lines = [json.dumps(watch.described())] if as_json else [*news.take(), *watch.lines(_width())]
        if (text := "\n".join(lines)) != shown:
            click.echo(text)
            sys.stdout.flush()
            shown = text
        if wait and not watch.working:
            await asyncio.sleep(0)  # let the last events in
            for line in news.take() if not as_json else ():
                click.echo(line)
            return
        await asyncio.sleep(interval)
        await watch.look(client)


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns
