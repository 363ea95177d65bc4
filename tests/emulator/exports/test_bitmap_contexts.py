"""``qemu:dirty-bitmap:NAME`` over NBD: the same lists, extents and refusals as qemu-storage-daemon and qemu-nbd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.libnbd import script
from kit.livedisk import Daemon
from kit.peers import run
from kit.qemu import QemuNbd, StorageDaemon, create, qemu_img, qemu_io
from kit.qmp import Qmp, QmpError

MIB = 1 << 20
PREFIX = "qemu:dirty-bitmap:"


def node(folder: Path, name: str, *, backing: str | None = None, size: str = "8M", **more: Any) -> list[str]:
    path = folder / f"{name}.qcow2"
    if not path.exists():
        create(path, size)
    file = {"driver": "file", "filename": str(path), "node-name": f"{name}-file"}
    return ["--blockdev", json.dumps({"driver": "qcow2", "node-name": name, "file": file, "backing": backing, **more})]


def add(qmp: Qmp, name: str, on: str = "a", **more: Any) -> None:
    qmp.execute("block-dirty-bitmap-add", node=on, name=name, **more)


def export(qmp: Qmp, ident: str, of: str = "a", **more: Any) -> None:
    qmp.execute("block-export-add", type="nbd", id=ident, node_name=of, name=ident, **more)


def extents(uri: str, context: str) -> list[tuple[int, int, int]]:
    """What nbdinfo shows: (offset, length, flags)."""
    shown = json.loads(run(["nbdinfo", "--json", f"--map={context}", uri]).stdout)
    return [(one["offset"], one["length"], one["type"]) for one in shown]


WRITES = ["write 64k 64k", "write 1M 100k", "write -z 3M 64k", "write 8191k 1k", "write 5M 512"]


def asked(peer: type[StorageDaemon], folder: Path, scene: Callable[[StorageDaemon, Qmp], Any]) -> Any:
    folder.mkdir()
    options = [*node(folder, "base"), *node(folder, "a", backing="base"), *node(folder, "small", size="4M")]
    options += node(folder, "ro", **{"read-only": True})
    with peer(folder, *options) as daemon, daemon.qmp(timeout=20) as qmp:
        return scene(daemon, qmp)


def same(short_path: Path, scene: Callable[[StorageDaemon, Qmp], Any]) -> Any:
    ours, theirs = asked(Daemon, short_path / "l", scene), asked(StorageDaemon, short_path / "q", scene)
    assert ours == theirs
    return ours


def test_what_was_written_is_shown(short_path: Path) -> None:
    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        add(qmp, "x")
        add(qmp, "fine", granularity=512)
        add(qmp, "empty", disabled=True)
        export(qmp, "e", writable=True, bitmaps=["x", "fine", {"node": "a", "name": "empty"}], allocation_depth=True)
        qemu_io(daemon.uri("e"), *WRITES, format="raw")
        found = [extents(daemon.uri("e"), PREFIX + name) for name in ("x", "fine", "empty")]
        qemu_io(daemon.uri("e"), "write 6M 1M", format="raw")
        return [*found, extents(daemon.uri("e"), PREFIX + "x")]

    found = same(short_path, scene)
    assert found[0][:3] == [(0, 65536, 0), (65536, 65536, 1), (131072, MIB - 131072, 0)]
    assert found[2] == [(0, 8 * MIB, 0)]


def test_contexts_are_listed_as_qemu_lists_them(short_path: Path) -> None:
    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        add(qmp, "x")
        add(qmp, "y", disabled=True)
        export(qmp, "e", writable=True, bitmaps=["x", {"node": "a", "name": "y"}], allocation_depth=True)
        queries = ["", "qemu:", PREFIX, PREFIX + "x", PREFIX + "z", PREFIX + "x:", "qemu:dirty-bitmap", "base:"]
        return script(
            None,
            """
            result = []
            for query in queries:
                listed, h = [], nbd.NBD()
                if query:
                    h.add_meta_context(query)
                h.set_opt_mode(True)
                h.connect_uri(where)
                h.opt_list_meta_context(listed.append)
                h.opt_go()
                result.append([query, listed, [h.can_meta_context(name) for name in queries if name]])
                h.shutdown()
            """,
            where=daemon.uri("e"),
            queries=queries,
        )

    same(short_path, scene)


REFUSED: dict[str, Callable[[Qmp], None]] = {
    "no such bitmap": lambda qmp: export(qmp, "e", bitmaps=["z"]),
    "no such bitmap by node": lambda qmp: export(qmp, "e", bitmaps=[{"node": "a", "name": "z"}]),
    "no such node": lambda qmp: export(qmp, "e", bitmaps=[{"node": "z", "name": "z"}]),
    "not in the chain": lambda qmp: export(qmp, "e", of="base", bitmaps=["x"]),
    "enabled, the export read-only": lambda qmp: export(qmp, "e", bitmaps=["x"]),
    "legacy, enabled": lambda qmp: qmp.execute("nbd-server-add", device="a", bitmap="x"),
    "legacy, not there": lambda qmp: qmp.execute("nbd-server-add", device="a", bitmap="z"),
    "shown already": lambda qmp: (export(qmp, "d", bitmaps=["off"]), export(qmp, "e", bitmaps=["off"]))[0],
    "no name": lambda qmp: export(qmp, "e", bitmaps=[""]),
    "changed while it is shown": lambda qmp: (
        export(qmp, "d", bitmaps=["off"]),
        qmp.execute("block-dirty-bitmap-clear", node="a", name="off"),
    )[0],
    "removed while it is shown": lambda qmp: (
        export(qmp, "d", bitmaps=["off"]),
        qmp.execute("block-dirty-bitmap-remove", node="a", name="off"),
    )[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_those_of_qemu(name: str, short_path: Path) -> None:
    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        add(qmp, "x")
        add(qmp, "off", disabled=True)
        with pytest.raises(QmpError) as caught:
            REFUSED[name](qmp)
        return caught.value.kind, caught.value.desc, qmp.execute("query-block-exports")

    same(short_path, scene)


def test_what_is_allowed(short_path: Path) -> None:
    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        """A bitmap further down, one of another node, one of a read-only node, and use after the export is gone."""
        add(qmp, "off", disabled=True)
        add(qmp, "below", on="base", disabled=True)
        add(qmp, "other", on="small")
        add(qmp, "still", on="ro")
        export(qmp, "e", bitmaps=["off", "below", {"node": "small", "name": "other"}])
        export(qmp, "r", of="ro", bitmaps=["still"])
        found = [extents(daemon.uri("e"), PREFIX + name) for name in ("off", "below")]
        found.append(extents(daemon.uri("r"), PREFIX + "still"))
        busy = qmp.execute("query-named-block-nodes", flat=True)
        found.append(sorted((one["node-name"], one.get("dirty-bitmaps")) for one in busy))
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("block-dirty-bitmap-clear", node="a", name="off")
        qmp.execute("nbd-server-add", device="a", name="old", bitmap="off")
        return [*found, extents(daemon.uri("old"), PREFIX + "off")]

    same(short_path, scene)


def test_inconsistent_bitmaps_are_refused(short_path: Path) -> None:
    def scene(daemon: StorageDaemon, qmp: Qmp) -> Any:
        with pytest.raises(QmpError) as caught:
            export(qmp, "e", bitmaps=["lost"])
        return caught.value.kind, caught.value.desc

    answers = []
    for peer, place in ((Daemon, "l"), (StorageDaemon, "q")):
        folder = short_path / place
        folder.mkdir()
        path = create(folder / "a.qcow2", "8M")
        qemu_img("bitmap", "--add", path, "lost")
        options = node(folder, "a")
        with StorageDaemon(folder, *options, name="killed", nbd=False) as daemon:
            daemon.qmp().close()  # it has opened the image
            daemon.kill()
        with peer(folder, *options) as daemon, daemon.qmp() as qmp:
            answers.append(scene(daemon, qmp))
    assert answers[0] == answers[1]


def test_a_stored_bitmap_is_shown_alike_by_qemu_nbd(short_path: Path) -> None:
    folder = short_path / "l"
    folder.mkdir()
    options = node(folder, "a")
    with Daemon(folder, *options) as daemon, daemon.qmp() as qmp:
        add(qmp, "x", persistent=True)
        add(qmp, "fine", persistent=True, granularity=512)
        export(qmp, "e", writable=True, bitmaps=["x", "fine"])
        qemu_io(daemon.uri("e"), *WRITES, format="raw")
        ours = {name: extents(daemon.uri("e"), PREFIX + name) for name in ("x", "fine")}
    qemu_img("check", folder / "a.qcow2")
    for name in ours:
        with QemuNbd(folder, folder / "a.qcow2", "-r", "-B", name, format="qcow2", name=f"nbd-{name}") as theirs:
            assert extents(theirs.uri, PREFIX + name) == ours[name]


def test_a_bitmap_is_shown_through_a_device(short_path: Path) -> None:
    folder = short_path / "l"
    folder.mkdir()
    device = ["--device", "virtio-blk,drive=a,id=disk0"]
    with Daemon(folder, *node(folder, "a"), *device) as daemon, daemon.qmp() as qmp:
        add(qmp, "x")
        qmp.execute("nbd-server-add", device="disk0", name="e", writable=True, bitmap="x")
        qemu_io(daemon.uri("e"), *WRITES, format="raw")
        assert extents(daemon.uri("e"), PREFIX + "x")[1] == (65536, 65536, 1)
