"""``livedisk jobs`` and ``livedisk graph``, on our daemon and on QEMU's: they ask nothing that QEMU does not answer."""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon, executable, livedisk
from kit.qemu import StorageDaemon, create, qemu_io
from livedisk.emulator.cli.figures import bar, duration, human_bytes
from livedisk.emulator.cli.graph import Box, Link, Picture, as_json
from livedisk.emulator.cli.graph_svg import svg
from livedisk.emulator.cli.graph_text import dot, text
from livedisk.emulator.cli.jobs import Progress, advice

pytestmark = pytest.mark.timeout(60)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=[Daemon, StorageDaemon], ids=["livedisk", "qemu"])
def daemon(request: pytest.FixtureRequest, short_path: Path) -> Iterator[StorageDaemon]:
    """A <- B with 4 MiB of data, and a target T; B is exported."""
    base = create(short_path / "a.qcow2", "8M")
    qemu_io(base, "write -P 1 0 4M")
    create(short_path / "b.qcow2", "8M", backing=base)
    create(short_path / "t.qcow2", "8M")
    nodes = [
        f"driver=qcow2,node-name=B,file.driver=file,file.filename={short_path}/b.qcow2,backing.node-name=A,"
        "backing.driver=qcow2,backing.read-only=on,backing.file.driver=file,"
        f"backing.file.filename={short_path}/a.qcow2",
        f"driver=qcow2,node-name=T,file.driver=file,file.filename={short_path}/t.qcow2",
    ]
    options = [word for node in nodes for word in ("--blockdev", node)]
    with request.param(short_path, *options, "--export", "type=nbd,id=e,node-name=B,writable=on") as running:
        yield running


def mirror(daemon: StorageDaemon, **more: Any) -> None:
    with daemon.qmp() as qmp:
        qmp.execute("blockdev-mirror", job_id="m", device="B", target="T", sync="full", **more)


def jobs(daemon: StorageDaemon, *options: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return livedisk("jobs", daemon.qmp_socket, *options, expect=expect)


def test_a_line_a_job_with_what_it_waits_for(daemon: StorageDaemon) -> None:
    assert jobs(daemon).stdout == "no jobs\n"
    mirror(daemon)
    assert jobs(daemon, "--wait").stdout
    first, *rest = jobs(daemon).stdout.splitlines()
    words = first.split()
    assert set(words.pop(3)) == {"#"}
    assert words == ["m", "mirror", "ready", "100", "%", "8.00", "MiB", "of", "8.00", "MiB"]
    assert [line.split(": ")[1] for line in rest] == ["job-complete id=m", "block-job-cancel device=m"]


def test_json_has_qemus_members_and_ours(daemon: StorageDaemon) -> None:
    mirror(daemon, speed=1)
    [job] = json.loads(jobs(daemon, "--json").stdout)
    assert (job["id"], job["type"], job["status"], job["speed"]) == ("m", "mirror", "running", 1)
    assert (job["rate"], job["converges"]) == (0, True)
    assert job["advice"] == ["block-job-set-speed device=m speed=0"]


def test_wait_ends_with_one_if_a_job_failed(daemon: StorageDaemon) -> None:
    with daemon.qmp() as qmp:
        qmp.execute("blockdev-mirror", job_id="m", device="B", target="T", sync="full", speed=1, auto_dismiss=False)
        qmp.execute("job-cancel", id="m")
    told = jobs(daemon, "--wait", expect=1).stdout
    assert "concluded" in told
    assert "job-dismiss id=m" in told
    with daemon.qmp() as qmp:
        qmp.execute("job-dismiss", id="m")


def test_watch_prints_what_changes_until_it_is_interrupted(daemon: StorageDaemon) -> None:
    mirror(daemon)
    command = [executable(), "jobs", str(daemon.qmp_socket), "--watch", "--interval=0.05"]
    # A test run in the background ignores SIGINT, and so would its children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if "ready" in line:
                break
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0


def test_watch_draws_on_a_terminal_until_the_daemon_ends(daemon: StorageDaemon) -> None:
    mirror(daemon, speed=1)
    ours, theirs = pty.openpty()
    command = [executable(), "jobs", str(daemon.qmp_socket), "--watch", "--interval=0.05"]
    child = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    ended = False
    try:
        while True:
            shown += os.read(ours, 65536)
            if "█".encode() in shown and not ended:
                ended = True
                daemon.signal(signal.SIGTERM)
    except OSError:
        pass  # the terminal is gone with its last user
    os.close(ours)
    assert child.wait(20) == 0, shown
    assert b"the daemon has ended" in shown


@pytest.mark.parametrize("command", ["jobs", "graph"])
def test_busy_socket_is_told_with_its_cause(command: str, daemon: StorageDaemon) -> None:
    with daemon.qmp():
        done = livedisk(command, daemon.qmp_socket, "--timeout=0.3", expect=1)
    assert "a QMP socket serves one at a time" in done.stderr.replace("\n", " ")
    assert not done.stdout


@pytest.mark.parametrize("command", ["jobs", "graph"])
def test_errors_and_usage(command: str, tmp_path: Path) -> None:
    assert f"'{tmp_path}/none'" in livedisk(command, tmp_path / "none", expect=1).stderr
    livedisk(command, expect=2)
    livedisk(command, tmp_path / "none", "--frobnicate", expect=2)
    shown = livedisk(command, "--help").stdout
    assert "Exit status:" in shown
    assert "serves one" in shown


def test_graph_as_text_shows_chains_exports_and_jobs(daemon: StorageDaemon) -> None:
    mirror(daemon, speed=1)
    lines = livedisk("graph", daemon.qmp_socket).stdout.splitlines()
    names = [line.split()[0] if not line.startswith("▼") else line.split()[1] for line in lines if line]
    filter_name = next(line.split()[0] for line in lines if "mirror_top" in line)
    assert sorted(names) == sorted([filter_name, "B", "A", "T", "job"])
    assert names.index(filter_name) + 1 == names.index("B") == names.index("A") - 1
    [top] = [line for line in lines if "mirror_top" in line]
    assert top.count("◀ export e") == 1
    [target] = [line for line in lines if line.startswith("T")]
    assert "t.qcow2" in target
    assert "◀ job m: target" in target
    [base] = [line for line in lines if line.startswith("▼ A")]
    assert "read-only" in base


def test_graph_in_every_format_has_every_box(daemon: StorageDaemon, tmp_path: Path) -> None:
    mirror(daemon, speed=1)
    found = json.loads(livedisk("graph", daemon.qmp_socket, "--format=json").stdout)
    kinds = {box["title"]: box["kind"] for box in found["boxes"]}
    assert {"A": "node", "B": "node", "T": "node", "m": "job", "e": "export"}.items() <= kinds.items()
    ids = {box["id"] for box in found["boxes"]}
    assert all(link["parent"] in ids and link["child"] in ids for link in found["links"])

    drawing = tmp_path / "graph.svg"
    livedisk("graph", daemon.qmp_socket, "--format=svg", "-o", drawing)
    root = ET.parse(drawing).getroot()
    named = {element.text for element in root.iter(f"{SVG}text") if element.get("class") == "name"}
    assert named == {title for title, kind in kinds.items() if kind != "export"}
    assert any(element.text == "exported as e (nbd)" for element in root.iter(f"{SVG}text"))

    digraph = livedisk("graph", daemon.qmp_socket, "--format=dot").stdout
    assert digraph.count(" -> ") == len(found["links"])
    assert digraph.startswith("digraph livedisk {")

    livedisk("graph", daemon.qmp_socket, "-o", tmp_path / "none" / "x", expect=1)


def picture(depth: int) -> Picture:
    """A chain of ``depth`` nodes below a device, the lowest shared with a free node."""
    boxes = [Box("d", "device", 'a "disk"'), *(Box(f"n{n}", "node", f"node-{n}", "qcow2") for n in range(depth))]
    links = [Link("d", "n0", "root"), *(Link(f"n{n}", f"n{n + 1}", "backing") for n in range(depth - 1))]
    return Picture([*boxes, Box("f", "node", "<free>", "qcow2")], [*links, Link("f", f"n{depth - 1}", "backing")])


def test_boxes_never_overlap_and_arrows_point_down() -> None:
    root = ET.fromstring(svg(picture(40)))
    places = []
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        places.append((x, y, x + width, y + height))
    assert len(places) == 42
    for one in places:
        for other in places:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert one is other or apart
    straight = [
        path.get("d", "")
        for path in root.iter(f"{SVG}path")
        if " L" in path.get("d", "") and "z" not in path.get("d", "")
    ]
    assert len(straight) == 40
    for path in straight:
        start, _, end = path.removeprefix("M").partition(" L")
        assert float(end.split(",")[1]) > float(start.split(",")[1])


def test_names_are_escaped_and_shared_nodes_told_once() -> None:
    small = picture(2)
    assert "&lt;free&gt;" in svg(small)
    assert r"a \"disk\"" in dot(small)
    assert "▼ node-1 (see above)" in text(small)
    assert json.loads(as_json(small))["links"][0] == {"parent": "d", "child": "n0", "name": "root"}
    assert text(Picture([], [])) == "an empty graph"
    ET.fromstring(svg(Picture([], [])))


def test_a_mirror_that_does_not_gain_on_the_guest_says_so() -> None:
    job = {"id": "m", "type": "mirror", "status": "running", "current-progress": 5, "total-progress": 9}
    assert [command for _, command in advice(job, Progress(rate=10.0, growth=10.0))] == [
        "block-job-change id=m type=mirror copy-mode=write-blocking"
    ]
    assert not list(advice(job, Progress(rate=10.0, growth=6.0)))
    assert Progress(rate=10.0, growth=6.0).seconds_left(job) == 1.0
    assert Progress(rate=10.0, growth=10.0).seconds_left(job) is None


def test_figures() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1024, 5 << 20, 1 << 60)] == [
        "0 B",
        "999 B",
        "0.98 KiB",
        "1.00 KiB",
        "5.00 MiB",
        "1.00 EiB",
    ]
    assert [duration(s) for s in (0, 7.4, 750, 10800)] == ["0:00", "0:07", "12:30", "3:00:00"]
    assert [bar(share, 4, "#-") for share in (0, 0.5, 1, 2)] == ["----", "##--", "####", "####"]
