"""The test kit: real peers and our own commands, run as a user runs them.

==================  ==============================================================================================
`kit.peers`         where the peers are; a missing one fails the test and names the Debian package
`kit.places`        short folders for sockets, free TCP ports, files placed on disk
`kit.process`       a child process with a log, waited for, always reaped, killed on demand
`kit.qmp`           a synchronous QMP client
`kit.qemu`          qemu-img, qemu-io, qemu-nbd, qemu-storage-daemon
`kit.livedisk`      ``livedisk daemon``, ``livedisk serve`` and any other of our commands
`kit.machine`       one command line for QEMU's emulator and for ours, and what can be compared of the two
`kit.script`        scripts that run on both
`kit.libnbd`        libnbd scripts, nbdinfo, nbdcopy
`kit.nbdkit`        nbdkit with any plugin
`kit.fio`           fio's nbd engine
`kit.writer`        a client that writes without pause and can prove afterwards what an image may contain
`kit.vm`            a virtual machine with a Debian kernel
==================  ==============================================================================================

Everything here is synchronous: a test reads from top to bottom, and the peers are other processes anyway. Fixtures
stand in ``tests/conftest.py``.
"""
