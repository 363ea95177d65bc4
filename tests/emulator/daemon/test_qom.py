"""Objects by path: answers as QEMU's, a device moved to another node while a guest writes, and fleecing as backup tools do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import assert_same, create, qemu_io
from kit.qmp import QmpError
from kit.side_by_side import MACHINE, Step, compare, step

NODES = [
    *("-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=a.qcow2"),
    *("-blockdev", "qcow2,node-name=b,file.driver=file,file.filename=b.qcow2"),
    *("-blockdev", "qcow2,node-name=ro,file.driver=file,file.filename=c.qcow2,read-only=on"),
    *(
        "-object",
        "iothread,id=io0",
        "-object",
        "secret,id=s0,data=abc",
        "-object",
        "throttle-group,id=t0,x-bps-total=1024",
    ),
    *("-object", "authz-simple,id=z0,identity=me", "-device", "virtio-blk-pci,drive=a,id=v1,serial=disk"),
    *("-device", "virtio-blk-pci,drive=b"),
]


def get(path: str, *names: str) -> list[Step]:
    return [step("qom-get", path=path, property=name) for name in names]


def put(path: str, name: str, value: Any) -> Step:
    return step("qom-set", path=path, property=name, value=value)


LOOK = [step("query-block"), step("query-iothreads")]
SCRIPTS: dict[str, list[Step]] = {
    "objects": [
        *(
            step("qom-list", path=path)
            for path in ("/objects/io0", "io0", "objects/s0", "/objects/t0", "z0", "/objects/zz")
        ),
        *get("/objects/io0", "type", "poll-max-ns", "aio-max-batch", "thread-pool-max", "zz"),
        *get("s0", "type", "data", "format", "file", "zz"),
        *get("z0", "identity"),
        *get("t0", "limits", "x-bps-total", "zz"),
        *(put("io0", "poll-max-ns", value) for value in (5, -5, "x", 1.5, None)),
        *(put("io0", name, 3) for name in ("poll-grow", "poll-shrink", "aio-max-batch", "type", "zz")),
        put("t0", "limits", {"bps-total": 4096}),
        *get("t0", "limits"),
        put("/objects/zz", "zz", 1),
        *(
            step("qom-list-properties", typename=name)
            for name in ("iothread", "secret", "throttle-group", "zz", "device")
        ),
        *LOOK,
    ],
    "devices": [
        *get("v1", "type", "drive", "serial", "realized", "write-cache", "virtio-backend", "logical_block_size", "zz"),
        *get("v1", "rerror", "num-queues", "discard", "share-rw", "queue-size", "iothread", "class"),
        *get("/machine/peripheral/v1/virtio-backend", "type", "drive", "serial", "zz", "secs"),
        *get("v1/virtio-backend", "drive"),
        *get("peripheral/v1", "drive"),
        *get("/machine/peripheral-anon/device[0]", "drive", "type"),
        *get("device[0]/virtio-backend", "drive"),
        *(put("v1", "drive", value) for value in ("zz", "", 3, "ro", "b")),
        put("v1", "serial", "x"),
        put("v1", "num-queues", 2),
        put("v1", "addr", "3"),
        put("v1", "zz", 2),
        put("v1", "type", "x"),
        *LOOK,
        step("device-list-properties", typename="zz"),
        step("qom-list", path="/machine/peripheral/zz"),
    ],
    "a device moves": [
        step("blockdev-add", driver="qcow2", node_name="larger", file={"driver": "file", "filename": "d.qcow2"}),
        put("v1", "drive", "larger"),
        *LOOK,
        *get("v1", "drive"),
        step("blockdev-del", node_name="larger"),
        step("blockdev-del", node_name="a"),
        put("/machine/peripheral/v1/virtio-backend", "drive", "a"),
        step("blockdev-add", driver="null-co", node_name="n"),
        put("v1", "drive", "n"),
        put("v1", "drive", "larger"),
        step("blockdev-del", node_name="a"),
        step("blockdev-del", node_name="n"),
        *LOOK,
    ],
}


def images(folder: Path) -> None:
    for name, size in (("a", "4M"), ("b", "4M"), ("c", "4M"), ("d", "8M")):
        create(folder / f"{name}.qcow2", size)


def in_any_order(text: str) -> str:
    """Lists of properties sorted by name: QEMU keeps them in a hash table."""

    def ordered(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value):
            return sorted(value, key=lambda one: one["name"])
        return value

    return json.dumps(ordered(json.loads(text)), sort_keys=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_answers_are_those_of_qemu(name: str, tmp_path: Path) -> None:
    compare(tmp_path, SCRIPTS[name], prepare=images, options=[*MACHINE, *NODES], even_out=in_any_order)


def test_the_properties_of_the_model_are_qemus(tmp_path: Path) -> None:
    asked = [step("device-list-properties", typename="virtio-blk-pci"), step("qom-list", path="/machine/peripheral/v1")]
    asked.append(step("qom-list", path="/machine/peripheral/v1/virtio-backend"))
    asked.append(step("qom-list-properties", typename="virtio-blk-pci"))
    here: set[str] = set()
    images(tmp_path)
    with Daemon(tmp_path, *_absolute(tmp_path), nbd=False) as daemon, daemon.qmp() as qmp:
        for command, arguments in (one for one in asked if isinstance(one, tuple)):
            here |= {one["name"] for one in qmp.call(command, arguments)}

    def only_known(text: str) -> str:
        found = [one for one in json.loads(text) if one["name"] in here]
        return in_any_order(json.dumps(found))

    (tmp_path / "compared").mkdir()
    compare(tmp_path / "compared", asked, prepare=images, options=[*MACHINE, *NODES], even_out=only_known)
    assert len(here) > 60


def _absolute(folder: Path) -> list[str]:
    return [word.replace("filename=", f"filename={folder}/") for word in NODES]


def test_the_tree_from_its_root(tmp_path: Path) -> None:
    images(tmp_path)
    with Daemon(tmp_path, *_absolute(tmp_path), nbd=False) as daemon, daemon.qmp() as qmp:

        def listed(path: str) -> dict[str, str]:
            return {one["name"]: one["type"] for one in qmp.execute("qom-list", path=path)}

        assert listed("/")["objects"] == "child<container>"
        assert listed("/machine/peripheral") == {"type": "string", "v1": "child<virtio-blk-pci>"}
        assert listed("/machine/peripheral-anon") == {"type": "string", "device[0]": "child<virtio-blk-pci>"}
        assert listed("/objects")["io0"] == "child<iothread>"
        assert listed("/chardevs") == {"type": "string", "kit": "child<chardev-socket>"}
        with pytest.raises(QmpError, match="Path 'virtio-backend' does not uniquely identify an object"):
            listed("virtio-backend")
        types = {one["name"]: one.get("parent") for one in qmp.execute("qom-list-types", implements="user-creatable")}
        assert types["iothread"] == "event-loop-base"
        assert "virtio-blk-pci" in {one["name"] for one in qmp.execute("qom-list-types", implements="device")}
        with pytest.raises(QmpError, match="cannot be changed while the object is in use"):
            qmp.execute("qom-set", path="s0", property="data", value="x")


def test_a_device_moves_to_another_node_while_its_guest_reads(short_path: Path) -> None:
    images(short_path)
    for name, number in (("a", 1), ("b", 2)):
        qemu_io(short_path / f"{name}.qcow2", f"write -P {number} 0 4M")
    options = ["-device", "virtio-blk,drive=a,id=v1"]
    for name in ("a", "b"):
        options += ["-blockdev", f"qcow2,node-name={name},file.driver=file,file.filename={short_path / name}.qcow2"]
    with Daemon(short_path, *options) as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="v1", name="d", writable=True)
        for name, number in (("b", 2), ("a", 1), ("b", 2)):
            qmp.execute("qom-set", path="v1", property="drive", value=name)
            qemu_io(daemon.uri("d"), f"read -P {number} 0 4M", format="raw")
        qemu_io(daemon.uri("d"), "write -P 3 0 4M", format="raw")
    qemu_io(short_path / "b.qcow2", "read -P 3 0 4M")
    qemu_io(short_path / "a.qcow2", "read -P 1 0 4M")


def test_fleecing_by_moving_the_device_under_a_filter_and_back(short_path: Path) -> None:
    images(short_path)
    qemu_io(short_path / "a.qcow2", "write -P 1 0 4M")
    before = create(short_path / "before.raw", "4M", format="raw")
    qemu_io(before, "write -P 1 0 4M", format="raw")
    disk = f"qcow2,node-name=a,file.driver=file,file.filename={short_path / 'a.qcow2'}"
    with Daemon(short_path, "-blockdev", disk, "-device", "virtio-blk,drive=a,id=v1") as daemon, daemon.qmp() as qmp:
        qmp.execute("nbd-server-add", device="v1", name="guest", writable=True)
        target = {"driver": "file", "filename": str(short_path / "b.qcow2")}
        qmp.execute("blockdev-add", driver="qcow2", node_name="target", file=target)
        qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="a", target="target")
        qmp.execute("qom-set", path="/machine/peripheral/v1", property="drive", value="cbw")
        qmp.execute("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
        qmp.execute("nbd-server-add", device="then", name="then")
        qemu_io(daemon.uri("guest"), "write -P 2 1M 1M", format="raw")
        assert_same(daemon.uri("then"), before, "-f", "raw", "-F", "raw")
        qemu_io(daemon.uri("guest"), "read -P 2 1M 1M", format="raw")
        qmp.execute("nbd-server-remove", name="then")
        qmp.execute("blockdev-del", node_name="then")
        qmp.execute("qom-set", path="/machine/peripheral/v1", property="drive", value="a")
        qmp.execute("blockdev-del", node_name="cbw")
        qmp.execute("blockdev-del", node_name="target")
        qemu_io(daemon.uri("guest"), "read -P 2 1M 1M", format="raw")
