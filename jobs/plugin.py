"""What brings the jobs in: importing this module registers their commands and events (entry point ``livedisk.plugins``)."""

from livedisk.jobs import backup_commands, commands, commit, create, events, mirror_commands, stream

__all__ = ["backup_commands", "commands", "commit", "create", "events", "mirror_commands", "stream"]
