"""The block layer: nodes, edges and permissions, requests in flight, drain, mapping types, the flat map, the I/O
engine.

    types.py        offsets, segments: how a driver says *where* bytes are
    permissions.py  what a user of a node needs and tolerates; QEMU's conflict messages
    driver.py       what an image format or protocol implements; the registry of drivers
    node.py         a named node and its edges: the one checked way in to a driver
    backend.py      where requests enter the graph (devices, exports, jobs): quiesce, range checks, the fast path
    graph.py        all nodes: open, delete, replace, permissions, drain, reopen
    slow_drain.py   tells what a drain waits for, where it waits for long
    flatmap.py      a lazily filled cache of the fully resolved chain, which makes depth free
    hostfile.py     an open host file: inline I/O where it cannot block, threads where it can
    fallocate.py    Linux calls on files that Python lacks; pagecache.py: is a file cached
    imagelock.py    image locks between processes, QEMU's
    status.py       block status: what a range reads as, and which layer says so
    copy.py         making a range of one node read as another's
    options.py      the options that every node takes; settings.py: what they come to, given or inherited
    gate.py         the one way to files that an image's header names
    reopen.py       change options of open nodes: plan, prepare, switch in one step
    blockers.py     who keeps a node busy, and for what
    throttle.py     so many requests or bytes a second, for one disk or a group
    debug.py        what formats tell a fault injector below them
    point_in_time.py  which clusters are as they were at one moment, and which were copied away
    transaction.py  prepare, then commit or abort, in order

Nothing here knows a driver, a device, an export, QMP or the command line.
"""
