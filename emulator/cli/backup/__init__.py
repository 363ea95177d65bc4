"""``livedisk backup``: full and incremental backups of a running emulator's disks, on QMP's own commands.

    manifest.py   what a folder of backups holds, and the one way to change it
    source.py     the emulator's disks and their dirty bitmaps, asked over QMP
    take.py       full and incremental: one checkpoint over several disks
    moment.py     the disks of one moment, exported over NBD, for somebody else to read
    verify.py     checksums, the chain, and the live disk against it
    restore.py    one checkpoint as an image of its own
    commands.py   the command line
    report.py     bars and tables

The emulator may be livedisk or QEMU. Images in the folder are plain qcow2: each increment's backing file is the one before it,
so ``qemu-img convert`` restores without us.

How tracking cannot be lost. A checkpoint is a dirty bitmap that was added at its moment, named after the folder and the
checkpoint's number. An increment copies what the *earlier* checkpoint's bitmap says (sync=bitmap, bitmap-mode=never: the
bitmap is not changed), and the same transaction adds the new checkpoint's. Only when the increment is on stable storage and
in the manifest is the earlier bitmap removed. Whatever fails, dies or is interrupted before, the earlier checkpoint and its
bitmap are as they were, and the next run first clears away what the interrupted one left (``Manifest.pending`` says what).
"""
