"""Handing a guest over from one livedisk to another: ``migrate`` and ``migrate-incoming``.

    wire.py        the stream: framed messages, each a typed Struct
    parameters.py  capabilities and parameters: which there are, what may be set
    events.py      MIGRATION
    migration.py   one daemon's migrations: the one that goes out, the one that comes in
    outgoing.py    the source's side       incoming.py   the destination's
    state.py       what is handed over: devices, exports, dirty bitmaps
    inactive.py    images that are another process's now
    commands.py    the QMP side

There is no memory to copy, so that a migration is nothing but its hand-over. Storage moves before it, by mirrors to the
destination's NBD server; the source ends those mirrors itself once it holds the guest, so that nobody else has to be awake.

    source                                              destination
      |-- Hello (disks, exports) -------------------------->|  checks that it has, or can make, all of it
      |<--------------------------- Welcome, or Refusal ----|
      :   STOP: the guest is held; mirrors end; what is dirty is copied
      |-- DeviceState, bitmaps, Switch -------------------->|  ends the mirrors' exports, takes the images over,
      |                                                     |  makes devices and exports; runs nothing
      |<-------------------------- Activated, or Refusal ---|
      :   point of no return: the source gives the guest up
      |-- Go ---------------------------------------------->|  RESUME
      |<---------------------------------------- Running ---|

Never both: the destination runs nothing before Go, and the source sends Go only when it has given up. Whatever fails before
that, the connection included, lets the source go on as it was, and the destination undo what it prepared. Should Go be lost,
neither runs; then ``query-status`` of both tells so, and ``cont`` on the source takes the guest back.

Source of commands, states, events and messages: QEMU ``qapi/migration.json``, ``migration/migration.c``; asked from QEMU 10.0.2.
QEMU's own stream, which carries a machine, is refused by name.
"""
