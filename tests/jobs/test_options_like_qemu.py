"""Jobs on a device of QEMU's emulator and of livedisk: every option, every verb in every state, with what the queries show.

Each script (`kit.script`) starts from a device on the chain A <- B <- C <- D, all of it opened on the command line, and nodes
T and U, targets, S, a smaller one, and R, a raw one. Differences that are meant stand in `MEANT`. Not asked: the queries while a
stream is concluded but not dismissed: QEMU 10.0.2 crashes then.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from kit.qemu import create, qemu_img
from kit.script import Script, compare, compare_chains, create_chain, play

MEANT: Final[dict[str, str]] = {
    r"dirty-bitmaps\[1\].count": "a backup's filter counts what the job copied as kept, QEMU's what it kept itself",
    r"(both required|unshared) by an unnamed block device": "a conflict names the job that it is with",
    r"theirs .Node \w is in use": "what may not be deleted because of a job names the kind of job",
}
"""Differences that are meant: a pattern of the text, and the reason."""

# ruff: noqa: E501 - a command is a line
SCRIPTS: Final[dict[str, str]] = {
    "stream with every option": """
(QEMU) block-stream device=D job-id=j base-node=A backing-file=./a.qcow2 speed=0 on-error=stop filter-node-name=F auto-finalize=false auto-dismiss=false
(event) BLOCK_JOB_PENDING id=j
(look)
(QEMU) block-job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) job-dismiss id=j
(look)
""",
    "stream, the filter while it runs": """
(QEMU) block-stream device=D job-id=j base-node=A speed=1 filter-node-name=F
(look)
(QEMU) blockdev-del node-name=F
(QEMU) blockdev-del node-name=B
(QEMU) block-stream device=D job-id=k
(QEMU) block-stream device=F job-id=k
(QEMU) block-stream device=C job-id=k
(QEMU) block-stream device=A job-id=j
(QEMU) block-commit device=D job-id=k
(QEMU) block-commit device=F job-id=k
(QEMU) block-commit device=F job-id=k top-node=C
(QEMU) blockdev-mirror device=D job-id=k target=T sync=full
(QEMU) blockdev-mirror device=F job-id=k target=T sync=full
(QEMU) job-cancel id=k
(QEMU) job-cancel id=j
(event) JOB_STATUS_CHANGE id=j status="null"
(look)
""",
    "stream without a job id": """
(QEMU) block-stream device=D
(look)
""",
    "stream, implicit filter while it runs": """
(QEMU) block-stream device=D job-id=j speed=1
(look)
(QEMU) job-pause id=j
(event) JOB_STATUS_CHANGE id=j status=paused
(look)
(QEMU) job-pause id=j
(QEMU) block-job-pause device=j
(QEMU) job-finalize id=j
(QEMU) job-complete id=j
(QEMU) job-dismiss id=j
(QEMU) block-job-set-speed device=j speed=2
(look)
(QEMU) block-job-cancel device=j
(QEMU) block-job-cancel device=j force=true
(event) BLOCK_JOB_CANCELLED device=j
""",
    "stream of an inner image, then a commit that is kept": """
(QEMU) block-stream device=C job-id=j base-node=A
(event) BLOCK_JOB_COMPLETED device=j
(look)
(QEMU) block-commit device=D top-node=C base-node=A job-id=c auto-dismiss=false
(event) JOB_STATUS_CHANGE id=c status=concluded
(QEMU) job-cancel id=c
(QEMU) job-pause id=c
(QEMU) job-resume id=c
(QEMU) job-finalize id=c
(QEMU) job-complete id=c
(QEMU) block-job-set-speed device=c speed=3
(QEMU) block-job-dismiss id=c
(look)
(QEMU) block-stream device=D job-id=s
(event) BLOCK_JOB_COMPLETED device=s
(look)
""",
    "commit with every option": """
(QEMU) block-commit device=D job-id=j top-node=C base-node=A backing-file=./a.qcow2 speed=0 on-error=enospc filter-node-name=F auto-finalize=false auto-dismiss=false
(event) BLOCK_JOB_PENDING id=j
(look)
(QEMU) job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(look)
(QEMU) job-dismiss id=j
(look)
""",
    "commit, the filter while it runs": """
(QEMU) block-commit device=D job-id=j top-node=C base-node=A speed=1 filter-node-name=F
(look)
(QEMU) blockdev-del node-name=F
(QEMU) blockdev-del node-name=B
(QEMU) block-stream device=D job-id=k
(QEMU) block-stream device=C job-id=k
(QEMU) block-commit device=D job-id=k
(QEMU) block-commit device=D job-id=k top-node=B base-node=A
(QEMU) blockdev-mirror device=D job-id=k target=T sync=full
(QEMU) blockdev-snapshot node=D overlay=T
(QEMU) job-complete id=j
(QEMU) job-cancel id=j
(event) JOB_STATUS_CHANGE id=j status="null"
(look)
""",
    "commit, cancelled when pending": """
(QEMU) block-commit device=D job-id=j top-node=C base-node=A auto-finalize=false
(event) BLOCK_JOB_PENDING id=j
(QEMU) job-pause id=j
(QEMU) block-job-cancel device=j
(event) BLOCK_JOB_CANCELLED device=j
(look)
""",
    "active commit, paused when ready": """
(QEMU) block-commit device=D job-id=j filter-node-name=F
(event) BLOCK_JOB_READY device=j
(look)
(QEMU) job-pause id=j
(event) JOB_STATUS_CHANGE id=j status=standby
(look)
(QEMU) job-complete id=j
(QEMU) block-job-cancel device=j
(QEMU) job-resume id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "active commit, held at the end": """
(QEMU) block-commit device=D job-id=j base-node=B auto-finalize=false auto-dismiss=false
(event) BLOCK_JOB_READY device=j
(QEMU) job-finalize id=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_PENDING id=j
(QEMU) job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) job-dismiss id=j
(look)
""",
    "active commit, cancelled when pending": """
(QEMU) block-commit device=D job-id=j base-node=B auto-finalize=false
(event) BLOCK_JOB_READY device=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_PENDING id=j
(QEMU) job-cancel id=j
(event) BLOCK_JOB_CANCELLED device=j
""",
    "active commit into a base of another size": """
(QEMU) blockdev-add node-name=E driver=qcow2 file={"driver":"file","filename":"large.qcow2"} backing=null
(QEMU) blockdev-snapshot node=D overlay=E
(QEMU) block-commit device=E job-id=j base-node=C
(QEMU) block-commit device=E job-id=j base-node=D
(event) BLOCK_JOB_READY device=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "mirror with every option": """
(QEMU) blockdev-mirror device=D job-id=j target=T sync=top replaces=D speed=0 granularity=4096 buf-size=65536 on-source-error=stop on-target-error=enospc filter-node-name=F copy-mode=write-blocking auto-finalize=false auto-dismiss=false
(event) BLOCK_JOB_READY device=j
(look)
(QEMU) job-complete id=j
(event) BLOCK_JOB_PENDING id=j
(QEMU) job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) job-dismiss id=j
(look)
""",
    "mirror, the filter while it runs": """
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full speed=1 filter-node-name=F
(QEMU) blockdev-del node-name=F
(QEMU) blockdev-del node-name=T
(QEMU) blockdev-del node-name=C
(QEMU) block-stream device=D job-id=k
(QEMU) block-stream device=F job-id=k
(QEMU) block-stream device=C job-id=k base-node=A speed=1
(QEMU) block-commit device=D job-id=k
(QEMU) block-commit device=F job-id=k
(QEMU) blockdev-mirror device=D job-id=k target=U sync=full
(QEMU) blockdev-mirror device=F job-id=k target=U sync=full
(QEMU) blockdev-mirror device=U job-id=k target=T sync=full
(QEMU) blockdev-snapshot-sync node-name=D snapshot-file=e.qcow2 snapshot-node-name=E
(QEMU) job-complete id=j
(QEMU) block-job-change id=j type=mirror copy-mode=write-blocking
(QEMU) job-cancel id=j
(event) JOB_STATUS_CHANGE id=j status="null"
(look)
""",
    "mirror, paused, then cancelled": """
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full
(event) BLOCK_JOB_READY device=j
(QEMU) block-job-pause device=j
(event) JOB_STATUS_CHANGE id=j status=standby
(look)
(QEMU) block-job-pause device=j
(QEMU) block-job-cancel device=j
(QEMU) block-job-change id=j type=mirror copy-mode=write-blocking
(QEMU) block-job-resume device=j
(event) JOB_STATUS_CHANGE id=j status=ready
(QEMU) block-job-resume device=j
(QEMU) block-job-cancel device=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "mirror, cancelled by force when ready": """
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full auto-dismiss=false
(event) BLOCK_JOB_READY device=j
(QEMU) job-cancel id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) query-jobs
(QEMU) query-block-jobs
(QEMU) job-dismiss id=j
(look)
""",
    "mirror, cancelled softly when ready, held": """
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full auto-finalize=false auto-dismiss=false
(event) BLOCK_JOB_READY device=j
(QEMU) block-job-cancel device=j
(event) BLOCK_JOB_PENDING id=j
(QEMU) block-job-cancel device=j
(QEMU) job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=j
""",
    "mirror to a raw node, and over": """
(QEMU) blockdev-mirror device=D job-id=j target=R sync=full
(event) BLOCK_JOB_READY device=j
(look)
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
(QEMU) blockdev-del node-name=D
(QEMU) blockdev-del node-name=R
(look)
""",
    "mirror of an inner node": """
(QEMU) blockdev-mirror device=C job-id=j target=T sync=full
(QEMU) blockdev-mirror device=A job-id=j target=T sync=full
(QEMU) blockdev-mirror device=D job-id=j target=T sync=bitmap bitmap=b
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full bitmap=b
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full bitmap-mode=always
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full unmap=true
(QEMU) blockdev-mirror device=D job-id=j target=T
(QEMU) blockdev-mirror job-id=j target=T sync=full
(QEMU) blockdev-mirror device=D job-id=j sync=full
(QEMU) blockdev-mirror device=D target=T sync=full
(QEMU) blockdev-mirror device=D job-id=9 target=T sync=full
(QEMU) blockdev-mirror device=D job-id=j target=T sync=full foo=1
(QEMU) blockdev-mirror device=D job-id=j target=S sync=full on-target-error=foo
(QEMU) blockdev-mirror device=T job-id=j target=D sync=full
""",
    "drive-mirror refused": """
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full format=foo
(QEMU) drive-mirror device=x job-id=j target=e.qcow2 sync=full
(QEMU) drive-mirror device=C job-id=j target=e.qcow2 sync=full
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full mode=existing format=qcow2
(QEMU) drive-mirror device=D job-id=j target=none/e.qcow2 sync=full
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full node-name=T
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full node-name=9
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full replaces=C
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full replaces=C node-name=E
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full replaces=x node-name=E
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full granularity=3
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full speed=-1
(QEMU) drive-mirror device=D job-id=j target=e.raw sync=top format=raw
(QEMU) drive-mirror device=D job-id=j target=d.qcow2 sync=full mode=existing format=qcow2
(QEMU) drive-mirror device=D job-id=j target=small.qcow2 sync=full mode=existing format=qcow2
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=incremental
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 sync=full filter-node-name=F
(look)
$ rm e.qcow2
""",
    "drive-mirror with every option": """
(QEMU) drive-mirror device=D job-id=j target=e.qcow2 format=qcow2 node-name=E replaces=D sync=top mode=absolute-paths speed=0 granularity=65536 buf-size=1048576 on-source-error=report on-target-error=report unmap=false copy-mode=background auto-finalize=true auto-dismiss=true
(event) BLOCK_JOB_READY device=j
(look)
(QEMU) blockdev-del node-name=E
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
(QEMU) blockdev-del node-name=D
(QEMU) blockdev-del node-name=E
""",
    "drive-mirror to raw, and over": """
(QEMU) drive-mirror device=D job-id=j target=e.raw format=raw node-name=E sync=full
(event) BLOCK_JOB_READY device=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "drive-mirror to an existing image, and over": """
(QEMU) drive-mirror device=D job-id=j target=u.qcow2 format=qcow2 sync=top mode=existing
(QEMU) blockdev-del node-name=U
(QEMU) drive-mirror device=D job-id=j target=u.qcow2 format=qcow2 sync=top mode=existing
(event) BLOCK_JOB_READY device=j
(QEMU) job-complete id=j
(event) BLOCK_JOB_COMPLETED device=j
(look)
""",
    "two jobs on one chain": """
(QEMU) block-commit device=D job-id=c top-node=B base-node=A speed=1
(QEMU) block-stream device=D job-id=s base-node=C speed=1
(QEMU) block-stream device=D job-id=t base-node=B speed=1
(QEMU) block-stream device=C job-id=t base-node=B speed=1
(look)
(QEMU) block-job-set-speed device=c speed=0
(event) BLOCK_JOB_COMPLETED device=c
(QEMU) block-job-set-speed device=s speed=0
(QEMU) job-cancel id=t
""",
    "verbs without a job, and wrong arguments": """
(QEMU) job-cancel
(QEMU) job-cancel id=x force=true
(QEMU) block-job-cancel device=x
(QEMU) block-job-cancel id=x
(QEMU) block-job-set-speed device=x
(QEMU) block-job-set-speed device=x speed=foo
(QEMU) block-job-set-speed device=x speed=1.5
(QEMU) block-job-change id=x
(QEMU) block-job-change id=x type=backup
(QEMU) block-job-change id=x type=mirror
(QEMU) block-job-change id=x type=mirror copy-mode=foo
(QEMU) block-job-change id=x type=foo
(QEMU) query-jobs foo=1
(QEMU) query-block-jobs foo=1
(QEMU) block-stream
(QEMU) block-stream device=D job-id=j speed=1.5
(QEMU) block-stream device=D job-id=j speed=foo
(QEMU) block-stream device=D job-id=j speed=9223372036854775808
(QEMU) block-stream device=D job-id=j speed=9223372036854775807
(event) BLOCK_JOB_COMPLETED device=j
(QEMU) block-stream device=D job-id=""
(QEMU) block-stream device=D job-id=j.k-l_m0
(event) BLOCK_JOB_COMPLETED device=j.k-l_m0
(QEMU) block-stream device=D job-id=j/k
(QEMU) block-commit device=D job-id=j top=""
(QEMU) block-commit device=D job-id=j base=""
(QEMU) block-commit device=D job-id=j on-error=ignore base-node=D
(QEMU) block-commit
""",
    "backup with every option": """
(QEMU) blockdev-backup device=D job-id=j target=T sync=full speed=0 on-source-error=stop on-target-error=enospc compress=true filter-node-name=F auto-finalize=false auto-dismiss=false x-perf={"max-workers":4,"max-chunk":65536,"use-copy-range":true} discard-source=false
(event) BLOCK_JOB_PENDING id=j
(look)
(QEMU) job-finalize id=j
(event) JOB_STATUS_CHANGE id=j status=concluded
(QEMU) query-jobs
(QEMU) query-block-jobs
(QEMU) job-dismiss id=j
(look)
""",
    "backup refused": """
(QEMU) blockdev-backup device=D job-id=j target=D sync=full
(QEMU) blockdev-backup device=D job-id=j target=S sync=full
(QEMU) blockdev-backup device=D job-id=j target=x sync=full
(QEMU) blockdev-backup device=x job-id=j target=T sync=full
(QEMU) blockdev-backup device=D job-id=j target=T sync=bitmap
(QEMU) blockdev-backup device=D job-id=j target=T sync=bitmap bitmap=b
(QEMU) blockdev-backup device=D job-id=j target=T sync=incremental
(QEMU) blockdev-backup device=D job-id=j target=T sync=incremental bitmap=b
(QEMU) blockdev-backup device=D job-id=j target=T sync=incremental bitmap=b bitmap-mode=always
(QEMU) blockdev-backup device=D job-id=j target=T sync=full bitmap=b
(QEMU) blockdev-backup device=D job-id=j target=T sync=full bitmap-mode=always
(QEMU) blockdev-backup device=D job-id=j target=T sync=none bitmap=b bitmap-mode=always
(QEMU) blockdev-backup device=D job-id=j target=R sync=full compress=true
(QEMU) blockdev-backup device=D job-id=j target=T sync=full speed=-1
(QEMU) blockdev-backup device=D job-id=j target=T sync=full filter-node-name=A
(QEMU) blockdev-backup device=D job-id=j target=T sync=full filter-node-name=9
(QEMU) blockdev-backup device=D job-id=9 target=T sync=full
(QEMU) blockdev-backup device=D target=T sync=full
(QEMU) blockdev-backup device=D job-id=j target=T
(QEMU) blockdev-backup device=D job-id=j target=T sync=foo
(QEMU) blockdev-backup device=D job-id=j target=T sync=full x-perf={"max-workers":0}
(QEMU) blockdev-backup device=D job-id=j target=T sync=full x-perf={"max-chunk":-1}
(QEMU) blockdev-backup device=D job-id=j target=T sync=full x-perf={"max-chunk":1000}
(QEMU) blockdev-backup device=D job-id=j target=T sync=full x-perf={"min-cluster-size":1000}
(QEMU) blockdev-backup device=T job-id=j target=D sync=full
(QEMU) blockdev-backup device=D job-id=j target=C sync=full
(QEMU) drive-backup device=D job-id=j target=e.qcow2 sync=full format=foo
(QEMU) drive-backup device=D job-id=j target=e.raw sync=top format=raw
(QEMU) drive-backup device=D job-id=j target=none/e.qcow2 sync=full
(QEMU) drive-backup device=D job-id=j target=none.qcow2 sync=full mode=existing format=qcow2
(QEMU) drive-backup device=D job-id=j target=d.qcow2 sync=full mode=existing format=qcow2
(QEMU) drive-backup device=x job-id=j target=e.qcow2 sync=full
(QEMU) drive-backup device=D job-id=j target=e.qcow2 sync=full node-name=E
(look)
$ rm -f e.qcow2
""",
    "backup while it runs": """
(QEMU) blockdev-backup device=D job-id=j target=T sync=full speed=1 filter-node-name=F
(QEMU) blockdev-del node-name=F
(QEMU) blockdev-del node-name=T
(QEMU) blockdev-del node-name=D
(QEMU) block-stream device=D job-id=s
(event) BLOCK_JOB_COMPLETED device=s
(QEMU) block-commit device=D job-id=k
(QEMU) block-commit device=F job-id=k
(QEMU) blockdev-mirror device=D job-id=k target=R sync=full
(QEMU) blockdev-mirror device=F job-id=k target=R sync=full
(QEMU) blockdev-backup device=D job-id=k target=T sync=full
(QEMU) blockdev-backup device=F job-id=j target=R sync=full
(QEMU) blockdev-backup device=C job-id=j target=R sync=full
(QEMU) blockdev-snapshot node=D overlay=R
(QEMU) block_resize node-name=D size=16777216
(QEMU) block_resize node-name=T size=16777216
(QEMU) job-complete id=j
(QEMU) job-finalize id=j
(QEMU) block-job-change id=j type=mirror copy-mode=background
(QEMU) block-job-pause device=j
(event) JOB_STATUS_CHANGE id=j status=paused
(QEMU) job-complete id=nosuch
(QEMU) job-complete id=nosuch
(look)
(QEMU) block-job-cancel device=j
(QEMU) block-job-resume device=j
(QEMU) block-job-cancel device=j
(event) BLOCK_JOB_CANCELLED device=j
(look)
""",
    "backup of an inner node, and none": """
(QEMU) blockdev-backup device=B job-id=j target=T sync=full
(event) BLOCK_JOB_COMPLETED device=j
(QEMU) blockdev-backup device=D job-id=k target=T sync=none
(QEMU) query-block-jobs
(QEMU) job-pause id=k
(event) JOB_STATUS_CHANGE id=k status=paused
(QEMU) job-resume id=k
(event) JOB_STATUS_CHANGE id=k status=running
(QEMU) job-cancel id=k
(event) JOB_STATUS_CHANGE id=k status="null"
(look)
""",
    "transactions": """
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j"}},{"type":"abort","data":{}}]
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j"}},{"type":"blockdev-backup","data":{"device":"D","target":"S","sync":"full","job-id":"k"}}]
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j"}},{"type":"blockdev-backup","data":{"device":"C","target":"R","sync":"full","job-id":"j"}}]
(QEMU) transaction actions=[{"type":"drive-backup","data":{"device":"D","target":"e.qcow2","sync":"full","job-id":"j"}},{"type":"blockdev-snapshot-sync","data":{"node-name":"x","snapshot-file":"f.qcow2"}}]
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j"}},{"type":"blockdev-snapshot-sync","data":{"node-name":"D","snapshot-file":"f.qcow2"}}] properties={"completion-mode":"grouped"}
(look)
$ rm -f e.qcow2 f.qcow2
""",
    "grouped, both succeed": """
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j","auto-finalize":false}},{"type":"blockdev-backup","data":{"device":"U","target":"R","sync":"full","job-id":"k"}}] properties={"completion-mode":"grouped"}
(event) JOB_STATUS_CHANGE id=k status=pending
(event) BLOCK_JOB_PENDING id=j
(QEMU) query-jobs
(QEMU) job-finalize id=j
(event) BLOCK_JOB_COMPLETED device=j
(event) BLOCK_JOB_COMPLETED device=k
(look)
""",
    "grouped, one cancelled": """
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j","speed":1}},{"type":"blockdev-backup","data":{"device":"U","target":"R","sync":"full","job-id":"k","auto-dismiss":false}}] properties={"completion-mode":"grouped"}
(event) JOB_STATUS_CHANGE id=k status=waiting
(QEMU) job-pause id=k
(QEMU) job-finalize id=k
(QEMU) job-cancel id=j
(event) BLOCK_JOB_CANCELLED device=j
(event) JOB_STATUS_CHANGE id=k status=concluded
(QEMU) query-jobs
(QEMU) job-dismiss id=k
(look)
""",
    "grouped, the waiting one cancelled": """
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j","speed":1}},{"type":"blockdev-backup","data":{"device":"U","target":"R","sync":"full","job-id":"k"}}] properties={"completion-mode":"grouped"}
(event) JOB_STATUS_CHANGE id=k status=waiting
(QEMU) job-cancel id=k
(event) BLOCK_JOB_CANCELLED device=j
(event) BLOCK_JOB_CANCELLED device=k
(look)
""",
    "individual, one cancelled": """
(QEMU) transaction actions=[{"type":"blockdev-backup","data":{"device":"D","target":"T","sync":"full","job-id":"j","speed":1}},{"type":"blockdev-backup","data":{"device":"U","target":"R","sync":"full","job-id":"k"}}]
(event) BLOCK_JOB_COMPLETED device=k
(QEMU) job-cancel id=j
(event) BLOCK_JOB_CANCELLED device=j
(look)
""",
    "snapshots with jobs": """
(QEMU) block-stream device=C job-id=j base-node=A speed=1
(QEMU) blockdev-snapshot-sync node-name=D snapshot-file=e.qcow2 snapshot-node-name=E
(look)
(QEMU) block-commit device=E top-node=D base-node=C job-id=k
(QEMU) block-job-set-speed device=j speed=0
(event) BLOCK_JOB_COMPLETED device=j
(QEMU) block-stream device=E job-id=s base-node=C
(event) BLOCK_JOB_COMPLETED device=s
(look)
""",
    "the human monitor": """
(QEMU) human-monitor-command command-line="block_stream D 1M"
(QEMU) human-monitor-command command-line="block_stream C"
(QEMU) human-monitor-command command-line="block_job_set_speed D 0"
(event) BLOCK_JOB_COMPLETED device=D
(QEMU) human-monitor-command command-line="info block-jobs"
(QEMU) human-monitor-command command-line="drive_mirror D e.qcow2"
(QEMU) human-monitor-command command-line="drive_backup x e.qcow2"
(QEMU) human-monitor-command command-line="commit x"
(QEMU) human-monitor-command command-line="block_job_cancel x"
(look)
""",
}


def prepare(folder: Path) -> list[str]:
    """Images in ``folder``; returns the start of each script."""
    create_chain(folder)
    for name, size in (("t", "8M"), ("small", "4M"), ("large", "16M")):
        create(folder / f"{name}.qcow2", size)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "c.qcow2", "-F", "qcow2", folder / "u.qcow2", "8M")
    create(folder / "r.raw", "8M", format="raw")
    nodes = []
    for index, name in enumerate("ABCD"):
        ro = ",read-only=on,auto-read-only=on,file.auto-read-only=on" if name != "D" else ""
        above = f",backing={'ABCD'[index - 1]}" if index else ""
        nodes.append(f"driver=qcow2,node-name={name},file.driver=file,file.filename={name.lower()}.qcow2{above}{ro}")
    nodes += [
        "driver=qcow2,node-name=T,file.driver=file,file.filename=t.qcow2",
        '{"driver":"qcow2","node-name":"U","file":{"driver":"file","filename":"u.qcow2"},"backing":null}',
        "driver=qcow2,node-name=S,file.driver=file,file.filename=small.qcow2",
        "driver=raw,node-name=R,file.driver=file,file.filename=r.raw",
    ]
    line = "livedisk daemon -display none -no-user-config -nodefaults -qmp unix:./qmp-sock,server=on,wait=off"
    line += "".join(f" -blockdev {node}" for node in nodes)
    return [f"$ {line} -device virtio-blk,drive=D,id=virtio0"]


def run(name: str, folder: Path, *, ours: bool) -> Script:
    folder.mkdir()
    return play(folder, [*prepare(folder), *SCRIPTS[name].strip().splitlines()], ours=ours)


@pytest.mark.parametrize("name", SCRIPTS)
def test_replies_events_and_graphs_are_those_of_qemu(name: str, short_path: Path) -> None:
    theirs, ours = (run(name, short_path / peer, ours=peer == "ours") for peer in ("theirs", "ours"))
    found = [*compare(theirs, ours), *compare_chains(theirs, ours)]
    found = [text for text in found if not any(re.search(pattern, text) for pattern in MEANT)]
    assert not found, "\n".join(found)
