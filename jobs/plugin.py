"""What brings the jobs in: importing this module registers their commands and events (entry point ``livedisk.plugins``)."""

from livedisk.jobs import commands, commit, events, mirror_commands, stream

__all__ = ["commands", "commit", "events", "mirror_commands", "stream"]
