"""Pull backups, as external backup tools make them: a filter under the device, the moment behind it exported, and back again.

Played to QEMU and to livedisk with the queries that such tools poll meanwhile; then, on livedisk, under a writing client.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.qemu import check, create, measure_map, qemu_img, qemu_io, read_all
from kit.qmp import Qmp
from kit.side_by_side import MACHINE, Host, Human, Job, Step, compare, step
from kit.writer import Writer, now

SIZE = 8 << 20
DEVICE = "/machine/peripheral/vd0"
NODES = [
    *("-blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"),
    *("-device", "virtio-blk-pci,drive=disk,id=vd0"),
    *("-blockdev", "qcow2,node-name=other,file.driver=file,file.filename=other.qcow2"),
    *("-device", "virtio-blk-pci,drive=other,id=vd1"),
]
POLLED: list[Step] = [
    *(step(f"query-{what}") for what in ("block", "status", "name", "block-jobs", "jobs", "block-exports")),
    step("query-named-block-nodes", flat=True),
]


def images(folder: Path) -> None:
    for name, number in (("disk", 1), ("other", 5)):
        base = create(folder / f"{name}-base.qcow2", SIZE)
        qemu_io(base, f"write -P {number} 0 4M")
        create(folder / f"{name}.qcow2", SIZE, options=f"backing_file={name}-base.qcow2,backing_fmt=qcow2")
        qemu_io(folder / f"{name}.qcow2", f"write -P {number + 1} 1M 2M", "write -z 6M 512k")
    for name in ("fleece", "full", "full2", "inc", "inc2"):
        create(folder / f"{name}.qcow2", SIZE)


def add(name: str, driver: str = "qcow2", **options: object) -> Step:
    if driver == "qcow2":
        options["file"] = {"driver": "file", "filename": f"{name}.qcow2"}
    return step("blockdev-add", driver=driver, node_name=name, **options)


def put_under(node: str) -> Step:
    return step("qom-set", path=DEVICE, property="drive", value=node)


def guest(*commands: str, device: str = "vd0") -> list[Step]:
    return [Human(f'qemu-io -d {device}/virtio-backend "{command}"') for command in commands]


def pulled(name: str, *, allocation: bool = False) -> Host:
    """What an NBD client reads from the export."""

    def act(folder: Path) -> object:
        uri = f"nbd+unix:///{name}?socket={folder}/nbd"
        data = folder / "pulled.raw"
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, data)
        found = hashlib.sha256(data.read_bytes()).hexdigest()
        return [found, measure_map(uri, "-f", "raw")] if allocation else found

    return Host(act)


def read_around_the_bitmap(folder: Path) -> object:
    """Inside the bitmap the moment is there; around it nothing is, not even at the start of the disk."""
    code = """
    result = []
    for offset in (1 << 20, 4 << 20, 0, 2 << 20, (1 << 20) + 32768):
        try:
            result.append(sorted(set(h.pread(65536, offset))))
        except nbd.Error:  # EPERM; QEMU says EINVAL
            result.append("refused")
    """
    return script(f"nbd+unix:///then?socket={folder}/nbd", code)


def export(name: str, **more: object) -> Step:
    return step("block-export-add", type="nbd", id=f"{name}-export", node_name=name, name=name, **more)


def end_export(name: str) -> list[Step]:
    return [step("block-export-del", id=f"{name}-export"), Host(lambda folder: time.sleep(0.2))]


SERVER = step("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd"}})
FLEECE: list[Step] = [
    add("fleece"),
    add("cbw", "copy-before-write", file="disk", target="fleece"),
    put_under("cbw"),
    add("then", "snapshot-access", file="cbw"),
]
BACK: list[Step] = [
    step("blockdev-del", node_name="then"),
    put_under("disk"),
    step("blockdev-del", node_name="cbw"),
    step("blockdev-del", node_name="fleece"),
]


def act(type: str, **data: object) -> dict[str, object]:
    return {"type": type, "data": {name.replace("_", "-"): value for name, value in data.items()}}


SCRIPTS: dict[str, list[Step]] = {
    "a full pull": [
        SERVER,
        *FLEECE,
        export("then"),
        *POLLED,
        *guest("write -P 9 512k 1M", "write -P 9 5M 64k", "discard 2M 64k", "write -z 3M 64k", "flush"),
        *POLLED,
        pulled("then"),
        *guest("write -P 10 0 8M"),
        pulled("then"),
        *POLLED,
        *end_export("then"),
        *BACK,
        *POLLED,
        *guest("read -P 10 0 8M"),
        step("nbd-server-stop"),
    ],
    "twice, through the server's own commands": [
        SERVER,
        *FLEECE,
        step("nbd-server-add", device="then", name="then"),
        *guest("write -P 9 512k 1M"),
        pulled("then"),
        step("nbd-server-remove", name="then"),
        *BACK,
        *guest("write -P 11 0 64k"),
        add("fleece"),
        *FLEECE[1:],
        step("nbd-server-add", device="then", name="then"),
        *guest("write -P 12 0 128k"),
        step("nbd-server-remove", name="then"),
        *BACK,
        *guest("read -P 12 0 128k"),
    ],
    "what a bitmap says": [
        SERVER,
        step("block-dirty-bitmap-add", node="disk", name="b0"),
        *guest("write -P 9 1M 64k", "write -P 9 4M 128k"),
        add("fleece"),
        add("cbw", "copy-before-write", file="disk", target="fleece", bitmap={"node": "disk", "name": "b0"}),
        put_under("cbw"),
        add("then", "snapshot-access", file="cbw"),
        export("then"),
        *guest("write -P 10 1M 64k", "write -P 10 0 64k"),
        *POLLED,
        Host(read_around_the_bitmap),
        *end_export("then"),
        *BACK,
        *POLLED,
    ],
    "refused while it is in use": [
        *FLEECE,
        step("blockdev-del", node_name="cbw"),
        step("blockdev-del", node_name="disk"),
        step("blockdev-del", node_name="fleece"),
        put_under("then"),
        put_under("disk"),
        step("blockdev-del", node_name="cbw"),
        step("blockdev-del", node_name="then"),
        step("blockdev-del", node_name="cbw"),
        step("blockdev-del", node_name="fleece"),
        *POLLED,
    ],
    "what a job's filter tells while the guest writes": [
        step("block-dirty-bitmap-add", node="disk", name="b0"),
        *guest("write -P 9 1M 64k", "write -P 9 4M 128k"),
        add("full"),
        step(
            "blockdev-backup",
            job_id="one",
            device="disk",
            target="full",
            sync="incremental",
            bitmap="b0",
            auto_finalize=False,
        ),
        Job("one", "pending"),
        *POLLED,
        *guest("write -P 10 1M 64k", "write -P 10 2M 4k", "write -P 10 2M 4k", "write -P 10 4M 4k"),
        *POLLED,
        step("job-finalize", id="one"),
        Job("one", "null"),
        *POLLED,
    ],
    "push, several disks, then increments": [
        *(add(name) for name in ("full", "full2")),
        step(
            "transaction",
            actions=[
                act("block-dirty-bitmap-add", node="disk", name="b"),
                act("block-dirty-bitmap-add", node="other", name="b"),
                act("blockdev-backup", job_id="one", device="disk", target="full", sync="full"),
                act("blockdev-backup", job_id="two", device="other", target="full2", sync="full"),
            ],
            properties={"completion-mode": "individual"},
        ),
        Job("one", "null"),
        Job("two", "null"),
        *POLLED,
        *(step("blockdev-del", node_name=name) for name in ("full", "full2")),
        *guest("write -P 9 1M 64k", "flush"),
        *guest("write -P 9 3M 1M", "flush", device="vd1"),
        *(add(name) for name in ("inc", "inc2")),
        step(
            "transaction",
            actions=[
                act("blockdev-backup", job_id="one", device="disk", target="inc", sync="incremental", bitmap="b"),
                act("blockdev-backup", job_id="two", device="other", target="inc2", sync="incremental", bitmap="b"),
            ],
            properties={"completion-mode": "grouped"},
        ),
        Job("one", "null"),
        Job("two", "null"),
        *POLLED,
        *(step("blockdev-del", node_name=name) for name in ("inc", "inc2")),
        Host(lambda folder: [measure_map(folder / f"{name}.qcow2") for name in ("inc", "inc2")]),
    ],
}


def even_out(text: str) -> str:
    """What is a matter of speed, of addresses, or of who took the bytes where."""
    text = re.sub(r'"(offset|wr_highest_offset|start)": \d+', r'"\1": 0', text)
    text = re.sub(r'"busy": (true|false)', '"busy": 0', text)
    return re.sub(r"\([\d.]+ [\w.]+ and [\d.]+ ops/sec\)|\d\d\.\d\d sec \([^)]*\)", "", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sequences_of_backup_tools_are_answered_as_in_qemu(name: str, short_path: Path) -> None:
    compare(short_path, SCRIPTS[name], prepare=images, options=[*MACHINE, *NODES], even_out=even_out, events=False)


def polled(qmp: Qmp) -> None:
    for what in ("query-block", "query-status", "query-name", "query-block-jobs", "query-named-block-nodes"):
        qmp.execute(what)


@pytest.mark.parametrize("rounds", [3])
def test_pulls_under_a_writing_client_each_show_one_moment(rounds: int, short_path: Path, tmp_path: Path) -> None:
    create(short_path / "disk.qcow2", SIZE, options="cluster_size=4096")
    options = [
        "-blockdev",
        f"qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={short_path}/disk.qcow2",
    ]
    options += ["-device", "virtio-blk-pci,drive=disk,id=vd0"]
    moments: list[tuple[bytes, int, int]] = []
    with Daemon(short_path, *options) as daemon, daemon.qmp(timeout=60) as qmp:
        qmp.execute("nbd-server-add", device="vd0", name="guest", writable=True)
        with Writer(daemon.uri("guest"), SIZE, short_path, depth=4) as writer:
            for number in range(rounds):
                path = create(short_path / f"fleece{number}.qcow2", SIZE)
                file = {"driver": "file", "filename": str(path)}
                qmp.execute("blockdev-add", driver="qcow2", node_name="fleece", file=file)
                qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="fleece")
                before = now()
                qmp.execute("qom-set", path=DEVICE, property="drive", value="cbw")
                after = now()
                qmp.execute("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
                qmp.execute("nbd-server-add", device="then", name="then")
                polled(qmp)
                moments.append((read_all(daemon.uri("then"), tmp_path, "-f", "raw"), before, after))
                polled(qmp)
                assert read_all(daemon.uri("then"), tmp_path, "-f", "raw") == moments[-1][0]
                qmp.execute("nbd-server-remove", name="then", mode="hard")
                qmp.execute("blockdev-del", node_name="then")
                qmp.execute("qom-set", path=DEVICE, property="drive", value="disk")
                qmp.execute("blockdev-del", node_name="cbw")
                qmp.execute("blockdev-del", node_name="fleece")
                polled(qmp)
            history = writer.finish()
        daemon.stop(expect=0)
    for image, before, after in moments:
        history.check_moment(image, before, after)
    check(short_path / "disk.qcow2")
    history.check_final(read_all(short_path / "disk.qcow2", tmp_path))


def test_what_a_reader_has_fetched_it_may_give_back(short_path: Path) -> None:
    """Discards through the moment's export: what is discarded needs no copy any more, and its copy no room."""
    create(short_path / "disk.qcow2", SIZE)
    qemu_io(short_path / "disk.qcow2", f"write -P 1 0 {SIZE}")
    create(short_path / "fleece.qcow2", SIZE)
    nodes = [
        {
            "driver": "qcow2",
            "node-name": "disk",
            "file": {"driver": "file", "filename": str(short_path / "disk.qcow2")},
        },
        {
            "driver": "qcow2",
            "node-name": "fleece",
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(short_path / "fleece.qcow2")},
        },
        {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "fleece"},
        {"driver": "snapshot-access", "node-name": "then", "file": "cbw", "discard": "unmap"},
    ]
    options = [part for node in nodes for part in ("--blockdev", json.dumps(node))]
    options += ["--export", "nbd,id=g,node-name=cbw,name=guest,writable=on"]
    options += ["--export", "nbd,id=t,node-name=then,name=then,writable=on"]
    with Daemon(short_path, *options) as daemon:
        qemu_io(daemon.uri("guest"), "write -P 2 0 4M", format="raw")
        qemu_io(daemon.uri("then"), "read -P 1 0 8M", "discard 0 2M", "discard 4M 2M", format="raw")
        qemu_io(daemon.uri("then"), "read 1M 64k", format="raw", expect=1)
        qemu_io(daemon.uri("guest"), "write -P 2 4M 4M", format="raw")
        qemu_io(daemon.uri("then"), "read -P 1 2M 2M", "read -P 1 6M 2M", format="raw")
        daemon.stop(expect=0)
    held = sum(extent["length"] for extent in measure_map(short_path / "fleece.qcow2") if extent["data"])
    assert held == 4 << 20
