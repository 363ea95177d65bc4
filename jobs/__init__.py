"""The jobs: stream, commit, mirror, backup and create, which work on the graph while the guest writes.

Their place, and what holds it:

    job.py        the life cycle, from two tables: legal moves, legal verbs
    copy.py       the one copy engine under all of them
    stream.py     commit.py     mirror.py     backup.py     create.py     each only what makes it different
    commands.py   their QMP commands and events

They stand above the emulator and are not known to it: ``jobs -> emulator -> nbd``. They come in through the entry-point
group ``livedisk.plugins`` (``emulator/qmp/registry.py``, `load_plugins`), as anybody's package may: commands by
``@command``, events by ``@event``, the actions of a transaction by ``@action`` (``emulator/qmp/transaction.py``;
``grouped=True`` for those that start a job). What they build on in the graph: `Graph.rewire` to move edges in one step,
``Edge.frozen`` to keep a chain as it is, `Graph.drained`, ``Node.trackers`` for dirty maps, ``Node.implicit`` for
filters that users do not see, `reopen.set_read_only` to write into a backing file.
"""
