"""The emulated disk: a virtio-blk device on a node, by the virtio 1.2 specification, section 5.2.

    spec.py        numbers of the specification: request types, status, features, the packed config space
    options.py     the properties of ``-device virtio-blk-pci``, typed once; what they must satisfy
    policy.py      rerror and werror: what a failed request leads to, as a table
    accounting.py  statistics of one device (QAPI BlockDeviceStats)
    runstate.py    prelaunch, running, paused, io-error ...: stop and cont hold and release guest I/O
    virtio_blk.py  the device: requests in, status out
    tree.py        all devices by id and by path: device_add, device_del
    blockstats.py  query-blockstats
    events.py      BLOCK_IO_ERROR, STOP, RESUME, DEVICE_DELETED

There is no bus and no ring: requests come by calls (from an export of the device, ``livedisk.emulator.exports``, or
from a transport that somebody writes on `VirtioBlk.submit`).
"""
