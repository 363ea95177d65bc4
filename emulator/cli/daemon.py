"""``livedisk daemon``: reads the command line, fills a `Daemon` with it, lets it serve.

Exit codes: 0 it ended as asked, 1 something failed, 2 the command line could not be understood. A failure names the
option as it was written. What is heavy to import waits until the command line was understood.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Sequence

from livedisk.emulator.cli.daemon_options import CLOSING, DESCRIPTION, TABLE, TITLE, USAGE
from livedisk.emulator.cli.options import Given, UsageError, manual, parse
from livedisk.emulator.cli.process import Background, PidFile, log_to_stderr, run_loop
from livedisk.emulator.errors import LiveDiskError

PROGRAM = "livedisk daemon"


def daemon(args: Sequence[str], prog_name: str = PROGRAM) -> int:
    """Run with these arguments; returns the exit code."""
    try:
        given = parse(TABLE, args)
    except UsageError as error:
        print(f"{prog_name}: {error}\nTry '{prog_name} --help'.", file=sys.stderr)
        return 2
    names = {option.name for option in given}
    if "help" in names:
        sys.stdout.write(manual(TITLE, USAGE, DESCRIPTION, TABLE, CLOSING))
        return 0
    if "version" in names:
        from livedisk.emulator.qmp.version import LIVEDISK_VERSION

        print(f"{prog_name} {LIVEDISK_VERSION}")
        return 0
    with Background("daemonize" in names) as background:
        if background.is_parent:
            return background.wait_for_child()
        log_to_stderr()
        return run_loop(lambda: _run(given, background))


async def _run(given: Sequence[Given], background: Background) -> int:
    """Build, serve, close. Returns the exit code."""
    from livedisk.emulator.cli.build import Builder, HelpShown, Refused
    from livedisk.emulator.qmp.registry import load_plugins

    load_plugins()
    try:
        builder = Builder(given, daemonize=background.wanted)
    except Refused as error:
        return _failed(error)
    emulator = builder.daemon
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, emulator.quit, "host-signal")
    pid_files = [PidFile(one.value) for one in given if one.name == "pidfile"][-1:]
    code = 0
    try:
        if await builder.build():
            for pid_file in pid_files:
                pid_file.write()
            background.ready()
            # What start-up made lives as long as the process: no need to look at it in every collection.
            gc.freeze()
            await emulator.serve()
    except HelpShown as answer:
        print(answer)
    except (Refused, LiveDiskError) as error:
        code = _failed(error)
    finally:
        try:
            await emulator.close()
        except LiveDiskError as error:
            code = _failed(error)
        for pid_file in pid_files:
            pid_file.remove()
    return code


def _failed(error: Exception) -> int:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return 1
