"""The commands that a person types, each `COMMANDS` names.

`main` only finds the command and imports its module, so that a daemon does not wait for what an interactive shell
needs. A command is called with ``args`` and ``prog_name`` and returns its exit code, or exits (as click's do).
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "serve": ("livedisk.emulator.cli.serve", "serve", "serve one image over NBD, with one line"),
    "daemon": ("livedisk.emulator.cli.daemon", "daemon", "run an emulated disk: QEMU's options, QMP, NBD"),
    "img": ("livedisk.emulator.cli.img", "img", "make, check, repair, convert, compare, snapshot and look at images"),
    "jobs": ("livedisk.emulator.cli.jobs", "jobs", "show what the jobs do: bars, rates, and what they wait for"),
    "graph": (
        "livedisk.emulator.cli.graph",
        "graph",
        "draw the nodes, devices, exports and jobs: text, svg, dot, json",
    ),
    "migrate": ("livedisk.emulator.cli.migrate", "migrate", "move running disks from one daemon to another"),
    "proxy": ("livedisk.emulator.cli.proxy", "proxy", "serve an export on a stable socket while it moves"),
    "tls": ("livedisk.emulator.cli.tls", "tls", "make certificates for NBD over TLS"),
    "backup": (
        "livedisk.emulator.cli.backup.commands",
        "backup",
        "full and incremental backups of a running emulator's disks",
    ),
    "qmp": ("livedisk.emulator.cli.qmp", "qmp", "talk to a QMP socket: one command, or a shell"),
}
"""By name: the module, the command in it, and a line for the help."""


def main() -> int:
    """The ``livedisk`` command. Exit codes: 0, 1 failure, 2 usage."""
    words = sys.argv[1:]
    name = words[0] if words else ""
    if name in COMMANDS:
        module, attribute, _ = COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        code: int | None = command(args=words[1:], prog_name=f"livedisk {name}")
        return code or 0
    if name in ("--help", "-h", "help"):
        sys.stdout.write(_overview())
        return 0
    if name in ("--version", "-V"):
        from livedisk.emulator.qmp.version import LIVEDISK_VERSION

        print(f"livedisk {LIVEDISK_VERSION}")
        return 0
    problem = f"livedisk: {name}: no such command\n" if name else ""
    sys.stderr.write(problem + _overview())
    return 2


def _overview() -> str:
    rows = "\n".join(f"    {name:<8} {text}" for name, (_, _, text) in COMMANDS.items())
    return f"""NAME
    livedisk - layered virtual disks: served over NBD, driven over QMP, snapshotted live

SYNOPSIS
    livedisk COMMAND [OPTION...]

COMMANDS
{rows}

    'livedisk COMMAND --help' tells more.

EXIT STATUS
    0  done
    1  failed; the reason is on standard error
    2  the command line is wrong
"""
