"""Exports: a node, or a device's guest door, served over NBD.

options.py        nbd-server-start, block-export-add and their kin, typed once
listen.py         socket addresses to listening sockets, in QEMU's words
node_export.py    a node as `livedisk.nbd.export.Export`: its own user of the graph, not subject to the run state
device_export.py  a device as `Export`: through its queue, under the run state and the error policy
exports.py        all exports by id, and the NBD server that they are served by
relay.py          an export that is somewhere else, and may move: what `livedisk proxy` serves
nbdkit_plugin.py  the same graph served by nbdkit instead
"""
