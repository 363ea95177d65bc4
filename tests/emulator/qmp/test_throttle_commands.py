"""throttle-group objects, block_set_io_throttle and qom-*: the same commands to QEMU and to us, the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.libnbd import script
from kit.livedisk import Daemon, executable
from kit.peers import peer
from kit.process import Process
from kit.qmp import Qmp, QmpError

Step = tuple[str, dict[str, Any]]
PLAIN = ["-blockdev", "null-co,node-name=n0,read-zeroes=on", "-blockdev", "null-co,node-name=n1,read-zeroes=on"]
OPTIONS = [
    *PLAIN, "-device", "virtio-blk,drive=n0,id=v0", "-device", "virtio-blk,drive=n1,id=v1",
    "-object", "throttle-group,id=g0,x-iops-total=7",
    "-object", '{"qom-type":"throttle-group","id":"g9","limits":{"iops-total":7}}',
]  # fmt: skip


@contextmanager
def monitor(arguments: list[str], folder: Path) -> Iterator[Qmp]:
    socket = folder / "qmp"
    command = [*arguments, "-qmp", f"unix:{socket},server=on,wait=off", *OPTIONS]
    with Process(command, log=folder / "log") as process:
        process.wait_for_socket(socket)
        with Qmp(socket) as qmp:
            yield qmp


def add(name: str, /, **limits: Any) -> Step:
    return "object-add", {
        "qom-type": "throttle-group",
        "id": name,
        **{key.replace("_", "-"): v for key, v in limits.items()},
    }


def limits(name: str, /, **values: int) -> Step:
    return add(name, limits={key.replace("_", "-"): value for key, value in values.items()})


def get(path: str, name: str) -> Step:
    return "qom-get", {"path": path, "property": name}


def put(path: str, name: str, value: Any) -> Step:
    return "qom-set", {"path": path, "property": name, "value": value}


def throttle(number: int, /, **values: Any) -> Step:
    none = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    return "block_set_io_throttle", {"id": f"/machine/peripheral/v{number}/virtio-backend", **none, **values}


LOOK: Step = ("query-block", {})
SCRIPTS: dict[str, list[Step]] = {
    "objects": [
        limits("g1", iops_total=100), add("g1"), add("g2"),
        get("/objects/g1", "limits"), get("g1", "x-iops-total"), get("g1", "type"), get("g0", "limits"), get("g9", "limits"),
        put("g1", "limits", {"iops-total": 200, "iops-total-max": 400, "iops-total-max-length": 5}), get("g1", "limits"),
        put("g1", "limits", {"iops-read": 7}), put("g1", "limits", {"iops-total": 0, "iops-read": 7}), get("g1", "limits"),
        put("g1", "x-iops-total", 9), put("g1", "x-iops-foo", 9), put("nope", "limits", {}), get("nope", "limits"),
        put("g1", "limits", {"foo": 1}), put("g1", "limits", {"iops-total": "x"}), get("g1", "foo"),
        limits("h1", iops_total=100, iops_read=5), limits("h2", iops_size=100), limits("h3", iops_total=10**16),
        limits("h4", iops_total=-1), limits("h5", iops_total=1, iops_total_max_length=0),
        limits("h6", iops_total=1, iops_total_max_length=5),
        limits("h7", iops_total=1, iops_total_max=10**14, iops_total_max_length=100), limits("h8", iops_total_max=10),
        limits("h9", iops_total=10, iops_total_max=5), add("h10", x_iops_total=5, limits={"bps-total": 7}),
        add("h11", x_iops_total=-5), add("h12", x_iops_total_max_length=0), add("h13", x_iops_total=5, x_iops_read=4),
        limits("h14", iops_total_max_length=-1), limits("h15", bps_total=1, bps_total_max=2, bps_total_max_length=5 * 10**9),
        add("h16", x_bps_read_max_length=5 * 10**9), get("h10", "limits"), ("qom-list", {"path": "/objects/g1"}),
    ],
    "nodes": [
        limits("g1", iops_total=100), limits("g2", bps_total=100),
        *(
            ("blockdev-add", {"driver": "throttle", "node-name": "t0", "file": "n9", **more})
            for more in ({"throttle-group": "nope"}, {}, {"throttle-group": ""}, {"throttle-group": "g1"})
        ),
        ("blockdev-add", {"driver": "null-co", "node-name": "n9"}),
        *(
            ("blockdev-add", {"driver": "throttle", "node-name": "t0", "file": "n9", **more})
            for more in ({"throttle-group": "nope"}, {"throttle-group": ""}, {"throttle-group": "g1"})
        ),
        ("query-named-block-nodes", {"flat": True}),
        ("object-del", {"id": "g1"}), ("object-del", {"id": "g0"}),
        *(
            ("blockdev-reopen", {"options": [{"driver": "throttle", "node-name": "t0", "file": "n9", **more}]})
            for more in ({"throttle-group": "nope"}, {"throttle-group": "g2"}, {})
        ),
        ("object-del", {"id": "g1"}), ("object-del", {"id": "g2"}),
        ("blockdev-del", {"node-name": "t0"}), ("object-del", {"id": "g2"}),
    ],
    "devices": [
        ("block_set_io_throttle", {"device": "nope", **throttle(0)[1], "id": "x"}),
        ("block_set_io_throttle", {key: value for key, value in throttle(0)[1].items() if key != "id"}),
        ("block_set_io_throttle", {**throttle(0)[1], "id": "nope"}), ("block_set_io_throttle", {"id": "v0", "bps": 0}),
        throttle(0), LOOK, throttle(0, iops=100), LOOK, throttle(0, bps=100, bps_max=200, bps_max_length=3, group="gg"), LOOK,
        throttle(0, iops=10, iops_rd=1), throttle(0, iops=-10), throttle(0, iops=10, iops_max_length=0), LOOK,
        throttle(1, iops=10, group="g0", iops_size=4096), LOOK, throttle(1, iops=20), LOOK, get("/objects/g0", "limits"),
        ("object-del", {"id": "g0"}), limits("gg", iops_total=1), throttle(1), ("object-del", {"id": "g0"}), LOOK,
        throttle(1, iops=30, group="gg"), LOOK, throttle(0), throttle(1), limits("gg", iops_total=1), LOOK,
    ],
}  # fmt: skip
THROTTLING = ("bps", "iops", "group")


def answers(arguments: list[str], steps: list[Step], folder: Path) -> list[Any]:
    folder.mkdir()
    found: list[Any] = []
    with monitor(arguments, folder) as qmp:
        for name, given in steps:
            try:
                found.append(comparable(name, qmp.call(name, given)))
            except QmpError as error:
                found.append((error.kind, error.desc))
    return found


def comparable(command: str, answer: Any) -> Any:
    """Of query-block only the throttling; lists of properties in order."""
    if command == "query-block":
        return [{key: value for key, value in one["inserted"].items() if key.startswith(THROTTLING)} for one in answer]
    if command == "query-named-block-nodes":
        return [{key: value for key, value in one.items() if key not in ("file", "image")} for one in answer]
    if command == "qom-list":
        return sorted(answer, key=lambda one: str(one["name"]))
    return answer


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_answers_are_those_of_qemu(name: str, short_path: Path) -> None:
    qemu = [peer("qemu-system-x86_64"), "-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"]
    theirs = answers(qemu, SCRIPTS[name], short_path / "q")
    ours = answers([executable(), "daemon", "-S"], SCRIPTS[name], short_path / "l")
    for step, one, other in zip(SCRIPTS[name], theirs, ours, strict=True):
        assert other == one, json.dumps(step)


def test_a_guest_that_is_throttled_gets_no_more_than_its_share(short_path: Path) -> None:
    """A limit of bytes a second, met by counting, not by the clock: what was served cannot exceed what has leaked."""
    options = ["--blockdev", "null-co,node-name=n0,size=1048576", "--device", "virtio-blk,drive=n0,id=v0"]
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="v0", name="d", writable=True)
        qmp.call("block_set_io_throttle", {**throttle(0)[1], "id": "v0", "bps": 1 << 20})
        seconds, served = script(
            daemon.uri("d"),
            """
            import time
            begun = time.monotonic()
            for _ in range(20):
                h.pread(65536, 0)
            result = [time.monotonic() - begun, 20 * 65536]
            """,
        )
        # The bucket holds a tenth of a second's worth, and the last request may pass it.
        assert served <= (1 << 20) * (seconds + 0.1) + 65536
        qmp.call("block_set_io_throttle", throttle(0)[1])
