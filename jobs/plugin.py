"""What brings the jobs in: importing this module registers their commands and events (entry point ``livedisk.plugins``)."""

from livedisk.jobs import backup_commands, commands, commit, create, events, mirror_commands, stream
from livedisk.jobs.migration import commands as migration_commands

__all__ = [
    "backup_commands",
    "commands",
    "commit",
    "create",
    "events",
    "migration_commands",
    "mirror_commands",
    "stream",
]
