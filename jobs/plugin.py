"""What brings the jobs in: importing this module registers their commands and events (entry point ``livedisk.plugins``)."""

from livedisk.jobs import commands, commit, create, events, mirror_commands, stream

__all__ = ["commands", "commit", "create", "events", "mirror_commands", "stream"]
