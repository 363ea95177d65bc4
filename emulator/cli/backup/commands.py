"""The command line of ``livedisk backup``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import msgspec

from livedisk.emulator.cli.backup import manifest as folder_of
from livedisk.emulator.cli.backup import take as taking
from livedisk.emulator.cli.backup.manifest import BackupError, Checkpoint, Image, Kind
from livedisk.emulator.cli.backup.moment import Moment, held, scratch_folder
from livedisk.emulator.cli.backup.report import Silent, TerminalBars, columns
from livedisk.emulator.cli.backup.source import find_disks
from livedisk.emulator.cli.backup.take import Order, Plan
from livedisk.emulator.cli.figures import human_bytes
from livedisk.emulator.cli.rate import Rate
from livedisk.emulator.errors import LiveDiskError, reason_of
from livedisk.emulator.qmp.client import QmpClient

HELP = """Back up the disks of a running emulator (livedisk or QEMU) into a folder, whole or only what changed.

SOCKET is the emulator's QMP monitor: a Unix socket's path, or HOST:PORT. FOLDER must be the same folder for the emulator and
for this command. It holds plain qcow2 images, each increment with the one before it as its backing file, and manifest.json
with checksums: "qemu-img convert FOLDER/disk.0003.qcow2 disk.raw" restores without livedisk.

Between backups a dirty bitmap on each disk records what the guest writes. A backup that fails, is interrupted or killed
changes nothing: the next one starts from the same checkpoint. If tracking was lost, a full backup is made instead, and the
reason is printed and recorded.

\b
Examples:
  livedisk backup full disk.qmp /backup/web
  livedisk backup incremental disk.qmp /backup/web
  livedisk backup incremental disk.qmp /backup/web --dry-run
  livedisk backup list /backup/web
  livedisk backup verify /backup/web --against disk.qmp
  livedisk backup restore /backup/web virtio0.raw --checkpoint 3

\b
Exit status:
  0  done, and all is well
  1  it failed, or what was verified is not well; the reason is on standard error
  2  the command line could not be understood
  130  interrupted
"""

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_SOCKET = click.argument("socket")
_FOLDER = click.argument("folder", type=click.Path(path_type=Path))
_DISKS = click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="NAME",
    help="A device's id or a node's name; may be repeated. Default: all.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no bars.")
_TIMEOUT = click.option(
    "--timeout", default=10.0, show_default=True, metavar="SECONDS", help="How long to wait for the monitor's greeting."
)
_NBD = click.option(
    "--nbd-socket",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where the emulator's NBD server listens, if it is running already.",
)
_SCRATCH = click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="FOLDER",
    help="Where what the guest overwrites meanwhile is kept. Default: a temporary folder.",
)


@click.group("backup", help=HELP, context_settings=_SETTINGS)
def backup() -> None:
    pass


def _run(work: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run a command's work to its exit code; Ctrl-C and SIGTERM cancel it, so that it clears away what it began."""

    async def stoppable() -> int:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            click.echo("livedisk backup: interrupted", err=True)
            return 130

    try:
        code = asyncio.run(stoppable())
    except (LiveDiskError, OSError) as error:
        click.echo(f"livedisk backup: {reason_of(error)}", err=True)
        code = 1
    sys.exit(code)


def _bars(as_json: bool) -> TerminalBars | Silent:
    return Silent() if as_json else TerminalBars()


def _print_json(value: Any) -> None:
    click.echo(json.dumps(msgspec.to_builtins(value), indent=2))


def _taking(kind: Kind, text: str) -> None:
    @backup.command(str(kind), help=text, context_settings=_SETTINGS)
    @_SOCKET
    @_FOLDER
    @_DISKS
    @click.option(
        "--bandwidth", default=0, type=Rate(), metavar="N", help="Bytes a second and disk, as 100M; 0: no limit."
    )
    @click.option("--compress", is_flag=True, help="Store data compressed.")
    @click.option(
        "--dry-run", is_flag=True, help="Say what would be copied and how long it would take; change nothing."
    )
    @_JSON
    @_TIMEOUT
    def command(
        socket: str,
        folder: Path,
        disks: tuple[str, ...],
        bandwidth: int,
        compress: bool,
        dry_run: bool,
        as_json: bool,
        timeout: float,
    ) -> None:
        order = Order(folder, kind, disks, bandwidth, compress)

        async def work() -> int:
            async with await QmpClient.connect(socket, timeout=timeout) as qmp:
                if dry_run:
                    _tell_plans(await taking.plan(qmp, order), as_json=as_json)
                else:
                    with _bars(as_json) as bars:
                        checkpoint = await taking.take(qmp, order, bars)
                    _tell_checkpoint(checkpoint, as_json=as_json)
            return 0

        _run(work)


_taking(Kind.FULL, "Copy whole disks into FOLDER, and track their changes from this moment on.")
_taking(
    Kind.INCREMENTAL,
    "Copy what changed since the latest checkpoint in FOLDER; whole disks where that is not known (the reason is recorded).",
)


def _tell_plans(plans: list[Plan], *, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "disk": plan.disk.name,
                "kind": plan.kind,
                "reason": plan.reason,
                "file": plan.file,
                "bytes": plan.expected,
                "seconds": plan.seconds,
            }
            for plan in plans
        ]
        _print_json(rows)
        return
    for plan in plans:
        clock = "of unknown duration (no earlier run tells)" if plan.seconds is None else f"about {plan.seconds:.1f} s"
        most = human_bytes(plan.expected)
        click.echo(f"{plan.disk.name}: {plan.kind} into {plan.file}, at most {most}, {clock}: {plan.reason}")


def _tell_checkpoint(checkpoint: Checkpoint, *, as_json: bool) -> None:
    if as_json:
        _print_json(checkpoint)
        return
    for name, image in checkpoint.images.items():
        took = f"{human_bytes(image.file_size)} in {image.seconds:.1f} s"
        click.echo(f"checkpoint {checkpoint.number}: {name}: {image.kind} ({image.reason}): {image.file}, {took}")
        if not image.persistent:
            click.echo(f"note: {name}: its image keeps no bitmaps, so tracking ends with the emulator", err=True)


@backup.command("list", context_settings=_SETTINGS)
@_FOLDER
@_JSON
def list_command(folder: Path, as_json: bool) -> None:
    """List the checkpoints in FOLDER."""

    async def work() -> int:
        manifest = folder_of.load(folder)
        if as_json:
            _print_json(manifest)
            return 0
        rows = [["NO", "TIME", "DISK", "KIND", "SIZE", "FILE", "REASON"]]
        for checkpoint in manifest.checkpoints:
            for name, image in checkpoint.images.items():
                rows.append(
                    [
                        str(checkpoint.number),
                        checkpoint.time,
                        name,
                        str(image.kind),
                        human_bytes(image.file_size),
                        image.file,
                        image.reason,
                    ]
                )
        click.echo(columns(rows))
        if manifest.pending is not None:
            click.echo("note: the last run did not come to its end; the next one clears away what it left", err=True)
        return 0

    _run(work)


@backup.command("verify", context_settings=_SETTINGS)
@_FOLDER
@_DISKS
@click.option("--checkpoint", "number", type=int, metavar="N", help="A checkpoint's number. Default: all.")
@click.option(
    "--against", metavar="SOCKET", help="Compare the newest checkpoints with the disks of the emulator at this monitor."
)
@_NBD
@_SCRATCH
@_JSON
@_TIMEOUT
def verify_command(
    folder: Path,
    disks: tuple[str, ...],
    number: int | None,
    against: str | None,
    nbd_socket: Path | None,
    scratch: Path | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Check that the files in FOLDER are those that were written and form whole chains.

    With --against also compare the newest checkpoint of each disk with the live disk, wherever the guest wrote nothing
    since.
    """

    async def work() -> int:
        from livedisk.emulator.cli.backup.verify import verify_files, verify_live

        with folder_of.locked(folder), _bars(as_json) as bars:
            manifest = folder_of.load(folder)
            checkpoints = manifest.checkpoints if number is None else [manifest.find(number)]
            images = [image for checkpoint in checkpoints for image in _chosen(checkpoint, disks).values()]
            if not images:
                raise BackupError(f"{folder} holds no checkpoint of {', '.join(disks) or 'any disk'}")
            findings = await verify_files(folder, manifest, images, bars)
            if against is not None and not findings.problems:
                newest = _newest(manifest, disks)
                async with await QmpClient.connect(against, timeout=timeout) as qmp:
                    with scratch_folder(scratch) as place:
                        server = str(nbd_socket.resolve()) if nbd_socket is not None else str(place / "nbd")
                        live = await verify_live(
                            qmp, folder, newest, server, place, bars, running=nbd_socket is not None
                        )
                findings.problems += live.problems
                findings.compared, findings.changed = live.compared, live.changed
        if as_json:
            _print_json(findings)
        else:
            click.echo(f"{findings.files} files checked")
            if against is not None and not findings.problems:
                same, changed = human_bytes(findings.compared), human_bytes(findings.changed)
                click.echo(f"live disks: {same} the same, {changed} written since")
        for problem in findings.problems:
            click.echo(f"livedisk backup: {problem}", err=True)
        return 1 if findings.problems else 0

    _run(work)


def _newest(manifest: folder_of.Manifest, disks: tuple[str, ...]) -> dict[str, Image]:
    """The newest image of each disk, which need not be of the newest checkpoint: that may have been of another disk."""
    return {name: image for one in manifest.checkpoints for name, image in _chosen(one, disks).items()}


def _chosen(checkpoint: Checkpoint, disks: tuple[str, ...]) -> dict[str, Image]:
    return {name: image for name, image in checkpoint.images.items() if not disks or name in disks}


@backup.command("restore", context_settings=_SETTINGS)
@_FOLDER
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--disk", metavar="NAME", help="Which disk; needed where the checkpoint has several.")
@click.option("--checkpoint", "number", type=int, metavar="N", help="A checkpoint's number. Default: the newest.")
@click.option("-f", "--format", "fmt", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True)
@_JSON
def restore_command(folder: Path, output: Path, disk: str | None, number: int | None, fmt: str, as_json: bool) -> None:
    """Write a disk, as it was at a checkpoint, to the new file OUTPUT. The files of its chain are verified first."""

    async def work() -> int:
        from livedisk.emulator.cli.backup.restore import check_chain, restore

        with folder_of.locked(folder), _bars(as_json) as bars:
            manifest = folder_of.load(folder)
            checkpoint = manifest.find(number)
            if disk is None and len(checkpoint.images) > 1:
                raise click.UsageError(f"--disk is needed: the checkpoint has {', '.join(checkpoint.images)}")
            name = disk or next(iter(checkpoint.images))
            image = checkpoint.images.get(name)
            if image is None:
                raise BackupError(
                    f"checkpoint {checkpoint.number} has no disk '{name}'; it has: {', '.join(checkpoint.images)}"
                )
            check_chain(folder, manifest, image, bars)
            await restore(folder, image, output, fmt, bars)
        if as_json:
            _print_json(
                {"disk": name, "checkpoint": checkpoint.number, "output": str(output), "bytes": image.virtual_size}
            )
        else:
            click.echo(f"{output}: '{name}' as of checkpoint {checkpoint.number}, {checkpoint.time} ({fmt})")
        return 0

    _run(work)


@backup.command("checkpoint", context_settings=_SETTINGS)
@_SOCKET
@_DISKS
@click.option("--new", metavar="BITMAP", help="Start a bitmap of this name on every disk in that moment.")
@click.option("--since", metavar="BITMAP", help="Freeze the bitmap of this name on every disk, and export it.")
@_NBD
@click.option(
    "--socket-path", type=click.Path(path_type=Path), metavar="PATH", help="Where the NBD server is to listen."
)
@_SCRATCH
@click.option("--exec", "command", metavar="COMMAND", help="Run a shell command meanwhile, and end with it.")
@_TIMEOUT
def checkpoint_command(
    socket: str,
    disks: tuple[str, ...],
    new: str | None,
    since: str | None,
    nbd_socket: Path | None,
    socket_path: Path | None,
    scratch: Path | None,
    command: str | None,
    timeout: float,
) -> None:
    """Export the disks of one moment over NBD, for any reader, while the guest writes on.

    In one transaction over all disks the bitmap --new starts, the bitmap --since is frozen, and what the guest overwrites from
    then on is kept. The URIs and the meta context are printed. Ctrl-C, or the end of --exec COMMAND, takes the exports away;
    the bitmaps stay.
    """
    if nbd_socket is not None and socket_path is not None:
        raise click.UsageError("--nbd-socket names a server that runs, --socket-path one to start: choose one")

    async def work() -> int:
        async with await QmpClient.connect(socket, timeout=timeout) as qmp:
            found = await find_disks(qmp, disks)
            with tempfile.TemporaryDirectory(prefix="livedisk-nbd-") as temporary, scratch_folder(scratch) as place:
                server = nbd_socket or socket_path or Path(temporary, "nbd")
                moment = Moment(
                    found,
                    {disk.name: since for disk in found} if since is not None else {},
                    str(server.resolve()),
                    place,
                    new=new,
                    running=nbd_socket is not None,
                )
                async with held(qmp, moment) as doors:
                    for name, door in doors.items():
                        context = "" if door.bitmap is None else f"  qemu:dirty-bitmap:{door.bitmap}"
                        click.echo(f"{name}: {door.uri}{context}")
                    return await _meanwhile(command)

    _run(work)


async def _meanwhile(command: str | None) -> int:
    if command is None:
        await asyncio.Event().wait()
    assert command is not None
    process = await asyncio.create_subprocess_shell(command)
    try:
        return 1 if await process.wait() else 0
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
