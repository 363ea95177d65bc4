"""The NBD protocol: constants, messages, a bytes-in/events-out core for each role, asyncio shells around them.

Knows nothing of graphs, images or jobs: a server asks an `Export` (a typing Protocol, `livedisk.nbd.export`)
to read, write and map. Source: the NBD project's ``doc/proto.md``.
"""
