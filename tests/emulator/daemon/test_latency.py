"""block-latency-histogram-set: the answers of QEMU, and every request of a guest in exactly one bin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.qmp import Qmp
from kit.side_by_side import Human, Step, compare, step

NULL = ("-blockdev", "null-co,node-name=n0,size=1048576,read-zeroes=on", "-device", "virtio-blk,drive=n0,id=v0")
ID = "/machine/peripheral/v0/virtio-backend"


def histogram(**boundaries: Any) -> Step:
    return step("block-latency-histogram-set", **{"id": ID, **boundaries})


SHOW = (
    step("query-blockstats"),
    Human(f'qemu-io -d {ID} "aio_read 0 512"'),
    Human(f'qemu-io -d {ID} "aio_flush"'),
    step("query-blockstats"),
)


def even_out(text: str) -> str:
    text = re.sub(r'"(\w*_total_time_ns|idle_time_ns)": \d+', r'"\1": 0', text)
    return re.sub(r"[\d.]+ sec|[\d.]+ [KMG]?iB/sec and [\d.]+ ops/sec", "", text)


def test_answers_are_those_of_qemu(tmp_path: Path) -> None:
    long = 10**12
    steps = [
        histogram(id="zz"),
        histogram(id="n0", boundaries=[1]),
        histogram(boundaries=[1, 2, long]),
        *SHOW,
        histogram(boundaries=[5, 5]),
        histogram(boundaries=[0]),
        histogram(boundaries_read=[long], boundaries_write=[3, 2]),
        histogram(boundaries_read=[1], boundaries_flush=[7, 6]),
        histogram(boundaries_zap=[7, 6], boundaries_flush=[1]),
        *SHOW,
        histogram(boundaries=[long], boundaries_read=[1, 2 * long], boundaries_flush=[]),
        histogram(boundaries=[-1]),
        histogram(boundaries=["x"]),
        histogram(boundaries={}),
        *SHOW,
        histogram(boundaries_read=[]),  # QEMU 10.0.2 crashes at the next request
        step("query-blockstats"),
        histogram(boundaries=[]),
        step("query-blockstats"),
        histogram(),
        *SHOW,
        step("qom-list-properties", typename="zz"),
        step("device-list-properties", typename="secret"),
        step("device-list-properties", typename="zz"),
    ]
    compare(tmp_path, steps, options=("-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", *NULL),
            even_out=even_out)  # fmt: skip


def test_every_request_of_a_guest_is_in_one_bin(short_path: Path) -> None:
    # Without read-zeroes: reads of what is known to be zeroes are answered as holes, and the device is not asked.
    data = ("-blockdev", "null-co,node-name=n0,size=1048576", *NULL[2:])
    with Daemon(short_path, *data) as daemon, Qmp(daemon.qmp_socket) as qmp:
        qmp.execute("nbd-server-add", device="v0", writable=True)
        qmp.execute("block-latency-histogram-set", id="v0", boundaries=[1, 10**12])
        script(
            daemon.uri("v0"),
            "for i in range(100): h.pread(4096, i * 4096)\n"
            "for i in range(70): h.pwrite(bytes(4096), i * 4096)\n"
            "h.flush()\n",
        )
        stats = qmp.execute("query-blockstats")[0]["stats"]
        for kind, count in (("rd", 100), ("wr", 70), ("flush", 1)):
            assert stats[f"{kind}_operations"] == count
            assert stats[f"{kind}_latency_histogram"] == {"boundaries": [1, 10**12], "bins": [0, count, 0]}
        assert stats["zone_append_latency_histogram"]["bins"] == [0, 0, 0]
        qmp.execute("block-latency-histogram-set", id="v0")
        assert not [name for name in qmp.execute("query-blockstats")[0]["stats"] if "histogram" in name]
