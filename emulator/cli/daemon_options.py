"""The options of ``livedisk daemon``: a row an option. The parser, the order of work and ``--help`` come from here.

Two families: those of qemu-storage-daemon and those of a QEMU command line. ``rank`` is the order in which QEMU works
its options off, whatever their order on the command line: objects, character devices, nodes, server, devices, exports,
monitors.
"""

from __future__ import annotations

from livedisk.emulator.cli.options import Option

BUILD = "What is emulated"
CONTROL = "Control"
PROCESS = "The process"
MACHINE = "Options of a whole machine"

DEVICES = 4
"""The rank of devices."""
MONITORS = 6
"""The rank of what lets clients in: everything else is there by then."""


def _option(names: str, argument: str, group: str, rank: int | None, help: str) -> Option:
    return Option(tuple(names.split("|")), argument, group, help, rank)


TABLE: tuple[Option, ...] = (
    _option(
        "object",
        "TYPE,id=ID[,PROPERTY=VALUE...]",
        BUILD,
        0,
        "Make an object that others refer to: iothread, secret, tls-creds-x509, authz-list and others. 'help' lists the types.",
    ),
    _option(
        "blockdev",
        "[driver=]DRIVER,node-name=NODE[,OPTION=VALUE...]",
        BUILD,
        2,
        "Open a node of the graph: file, host_device, raw, qcow2, null-co and others. Children are given inside "
        "(file.driver=..., backing.driver=...) or by the name of a node. Generic options: read-only, auto-read-only, "
        "cache.direct, cache.no-flush, discard=ignore|unmap, detect-zeroes=off|on|unmap, force-share.",
    ),
    _option(
        "nbd-server",
        "addr.type=unix,addr.path=PATH | addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]"
        "[,tls-creds=ID[,tls-authz=ID]]",
        BUILD,
        3,
        "Start the NBD server. With tls-creds it requires TLS of every client.",
    ),
    _option(
        "drive",
        "[if=virtio|none,][id=ID,]file=FILE,format=FORMAT[,OPTION=VALUE...]",
        BUILD,
        2,
        "A named image, with a virtio block device on it unless if=none. Options: cache=none|writeback|writethrough|unsafe|"
        "directsync, aio, discard, detect-zeroes, snapshot, readonly, copy-on-read, werror, rerror, throttling.*, index, unit, "
        "and those of the image's node.",
    ),
    _option(
        "device",
        "virtio-blk,drive=NODE[,id=ID][,PROPERTY=VALUE...]",
        BUILD,
        4,
        "Attach a virtio block device to a node. Properties are those of QEMU's virtio-blk-pci: serial, "
        "logical_block_size, physical_block_size, write-cache, share-rw, rerror, werror and so on.",
    ),
    _option(
        "export",
        "[type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on|off]",
        BUILD,
        5,
        "Export a node by the NBD server. (nbd-server-add on QMP also exports a device, which is the guest's door.)",
    ),
    _option(
        "add-fd",
        "fd=N,set=M[,opaque=TEXT]",
        BUILD,
        0,
        "Put a descriptor that this process inherited into the set M: the file name /dev/fdset/M opens it. (On QMP: add-fd.)",
    ),
    _option(
        "chardev",
        "socket,id=ID,path=PATH,server=on,wait=off | socket,id=ID,host=HOST,port=PORT | socket,id=ID,fd=N | stdio,id=ID",
        CONTROL,
        1,
        "Open a character device for a monitor to speak on. A listening socket holds start-up until a client is there, "
        "unless wait=off.",
    ),
    _option(
        "mon",
        "[chardev=]ID[,mode=control|readline][,pretty=on|off]",
        CONTROL,
        MONITORS,
        "Let a monitor speak on a character device: QMP with mode=control, else the human monitor.",
    ),
    _option(
        "monitor",
        "[chardev=]ID[,pretty=on|off] | stdio | unix:PATH,server=on,wait=off | none",
        CONTROL,
        MONITORS,
        "With the id of a character device: QMP on it, as in qemu-storage-daemon. With a device described in place: "
        "the human monitor on it, as in QEMU.",
    ),
    _option(
        "qmp",
        "unix:PATH,server=on,wait=off | tcp:HOST:PORT,server=on,wait=off | stdio | chardev:ID",
        CONTROL,
        MONITORS,
        "QMP on a device described in place.",
    ),
    _option("qmp-pretty", "DEVICE", CONTROL, MONITORS, "As -qmp, with indented JSON."),
    _option(
        "qtest",
        "unix:PATH | chardev:ID | DEVICE",
        CONTROL,
        MONITORS,
        "Let a client of QEMU's qtest protocol in. There is no machine to drive: every command is answered with FAIL.",
    ),
    _option("qtest-log", "PATH | none", CONTROL, None, "Write what is said on -qtest to a file (none: the default)."),
    _option(
        "set",
        "GROUP.ID.KEY=VALUE",
        CONTROL,
        None,
        "Add KEY=VALUE to the option GROUP (drive, device, chardev, mon, object) with that id that stands before.",
    ),
    _option(
        "readconfig",
        "FILE",
        CONTROL,
        None,
        'Read options from a file of sections [GROUP "ID"] with lines KEY = "VALUE".',
    ),
    _option("S", "", CONTROL, None, "Do not let the guest's I/O start; 'cont' does."),
    _option(
        "incoming",
        "tcp:HOST:PORT | unix:PATH | fd:N | defer",
        CONTROL,
        None,
        "Wait for a guest that another livedisk hands over ('migrate'), its I/O held; it runs when it is here, with -S after "
        "'cont'. With defer 'migrate-incoming' says where to listen.",
    ),
    _option("pidfile", "PATH", PROCESS, None, "Write the process id to a file when everything is set up."),
    _option("daemonize", "", PROCESS, None, "Go to the background; the command returns when everything is set up."),
    _option("trace|T", "PATTERN", PROCESS, None, "Refused: there is no tracing; use a Python profiler such as py-spy."),
    _option("help|h", "", PROCESS, None, "Print this and exit."),
    _option("version|V", "", PROCESS, None, "Print the version and exit."),
    _option("name", "[guest=]NAME", MACHINE, None, "What query-name answers; nothing else of it has an effect."),
    _option("uuid", "UUID", MACHINE, None, "What query-uuid answers."),
    *(
        _option(names, argument, MACHINE, None, "Without effect.")
        for names, argument in (
            ("machine|M", "TYPE"),
            ("accel", "NAME"),
            ("enable-kvm", ""),
            ("cpu", "MODEL"),
            ("smp", "N"),
            ("m", "SIZE"),
            ("display", "TYPE"),
            ("vga", "TYPE"),
            ("nographic", ""),
            ("nodefaults", ""),
            ("no-user-config", ""),
            ("no-reboot", ""),
            ("rtc", "OPTIONS"),
            ("serial", "DEVICE"),
            ("parallel", "DEVICE"),
            ("net", "OPTIONS"),
            ("boot", "OPTIONS"),
            ("k", "LANGUAGE"),
            ("msg", "OPTIONS"),
        )
    ),
)

STORAGE_DAEMON = frozenset(
    (
        "object",
        "blockdev",
        "nbd-server",
        "export",
        "chardev",
        "monitor",
        "pidfile",
        "daemonize",
        "trace",
        "help",
        "version",
    )
)
"""What qemu-storage-daemon takes. A command line of these alone is worked off in its own order, as that does."""

TITLE = "livedisk daemon - an emulated disk on a graph of images, controlled over QMP, served over NBD"
USAGE = "livedisk daemon [OPTION...]"
DESCRIPTION = """
Opens images (-blockdev), puts a virtual disk on them (-device), serves disks and nodes over NBD (-nbd-server, -export) and is
controlled over QMP (-qmp; or -chardev and -mon). Options are those of qemu-storage-daemon and of QEMU; each is taken with one
dash or two, and its argument as KEY=VALUE,... (with dots for members of members, ',,' for a comma) or as JSON.

A command line of qemu-storage-daemon's options alone is worked off from left to right: name what an option refers to before it.
With any of QEMU's, the order is QEMU's: objects, character devices, nodes, server, devices, exports, monitors.

Options of a whole virtual machine are accepted, so that QEMU command lines run as they stand; what has no effect here is named
once in the log. An option that is not listed here is an error.
"""
CLOSING = """\
SIGNALS
    SIGINT, SIGTERM, SIGHUP   flush and close everything, then exit

EXIT STATUS
    0   ended by 'quit' or a signal, with every image closed
    1   something could not be opened at start, or not be closed at the end
    2   the command line could not be understood

EXAMPLES
    A disk, its QMP socket, and the human monitor on the terminal:

        livedisk daemon -blockdev node-name=node-A,driver=qcow2,file.driver=file,file.filename=./a.qcow2 \\
            -device virtio-blk,drive=node-A,id=virtio0 -monitor stdio -qmp unix:./qmp-sock,server=on,wait=off

    An export for qemu-nbd, nbdcopy or a virtual machine:

        livedisk daemon --blockdev file,node-name=f,filename=disk.img --blockdev raw,node-name=d,file=f \\
            --nbd-server addr.type=unix,addr.path=/tmp/nbd.sock --export nbd,id=e0,node-name=d,writable=on

SEE ALSO
    livedisk serve, livedisk qmp
"""
