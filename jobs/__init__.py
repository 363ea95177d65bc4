"""The jobs, which work on the graph while the guest writes.

    states.py     the two tables: legal moves, legal verbs
    job.py        the life of any job, groups of jobs, all jobs of a daemon
    events.py     what jobs tell
    block_job.py  a job on nodes: its hold on them, speed, error policies
    copy.py       the copy engine: ranges from node to node, several at once, never two over the same bytes
    dirty.py      what is still to be copied      rate.py   how fast      sweep.py   one pass over an image
    filters.py    putting a filter on a node and taking it away            chains.py  finding images in a backing chain
    stream.py     commit.py     mirror.py     backup.py     create.py     each only what makes it different
    mirror_commands.py, backup_commands.py, targets.py, commands.py, plugin.py   the QMP side
    migration/    a guest handed over to another daemon, with the mirrors that go before

They stand above the emulator and are not known to it: ``jobs -> emulator -> nbd``. They come in through the entry-point
group ``livedisk.plugins`` (``emulator/qmp/registry.py``, `load_plugins`), as anybody's package may: commands by
``@command``, events by ``@event``, the actions of a transaction by ``@action`` (``emulator/qmp/transaction.py``;
``grouped=True`` for those that start a job). What they build on in the graph: `Graph.rewire` and `Graph.replace_node` to
move edges in one step, ``Edge.frozen`` to keep a chain as it is, ``Node.blockers`` to keep others off, `Graph.drained`,
``Node.trackers`` for dirty maps, `Node.exclusive` for a copy that looks and then writes, ``Node.implicit`` for filters that
users do not see, `reopen.set_read_only` to write into a backing file. The daemon keeps `Jobs` among its ``extensions`` and
ends them before it closes exports and nodes.
"""
