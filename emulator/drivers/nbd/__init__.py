"""nbd: an export of an NBD server as a node.

    options.py   what it takes (QEMU's BlockdevOptionsNbd)
    names.py     from file names and URIs to options, and back
    extents.py   block status: the server's extents, those ahead of a sweep kept for a moment
    driver.py    the driver: requests cut to what the server takes

What is below (connections, reconnecting, the protocol) is ``livedisk.nbd.client_link`` and the modules under it, which know
nothing of nodes. Documentation for users: ``docs/drivers/nbd.md``.
"""
