"""What the README tells a newcomer to run does what it says."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kit import qemu
from kit.peers import ROOT, run

BENCH = ROOT / "scripts" / "bench"
TOUR = ROOT / "scripts" / "tour.py"


@pytest.mark.slow
def test_quickstarts_tour_loses_nothing_and_leaves_sound_images(tmp_path: Path) -> None:
    images = tmp_path / "a-folder-with-a-name-that-is-too-long-for-a-unix-socket" / ("x" * 80)
    done = run([sys.executable, TOUR, "--seconds=2", "--snapshots=3", "--size=16", f"--keep={images}"], timeout=120)
    assert "Nothing was lost: 3 snapshots, four jobs and a migration" in done.stdout
    for what in (
        "backup of",
        "stream:",
        "commit:",
        "mirror:",
        "verified the backup",
        "verified the disk after the kill",
    ):
        assert what in done.stdout
    names = [*(f"disk-{n}" for n in range(5)), "backup", "moved"]
    assert {path.stem for path in images.glob("*.qcow2")} == set(names)
    for path in images.glob("*.qcow2"):
        qemu.check(path, leaks=True)
    assert [len(qemu.info(images / f"{name}.qcow2", "--backing-chain")) for name in names] == [1, 2, 3, 4, 2, 1, 1]


def test_tour_fails_loudly_when_the_daemon_does_not_start(tmp_path: Path) -> None:
    # A folder where the first image must go: nothing of the tour can happen.
    (tmp_path / "disk-0.qcow2").mkdir()
    done = run([sys.executable, TOUR, "--seconds=1", f"--keep={tmp_path}"], expect=1, timeout=60)
    assert "FAILED" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_bench_measures_all_three_and_writes_what_it_measured(tmp_path: Path) -> None:
    data, drawing = tmp_path / "bench.json", tmp_path / "bench.svg"
    arguments = [
        "--quick",
        "--runs=1",
        "--seconds=0.3",
        "--size=32",
        "--only=raw-randread-1",
        "--only=chain-8",
        "--markdown",
    ]
    done = run(
        [sys.executable, BENCH, *arguments, f"--json={data}", f"--picture={drawing}", f"--dir={tmp_path}"], timeout=120
    )
    found = json.loads(data.read_text())
    samples = found["workloads"]["raw-randread-1"]["samples"]
    assert set(samples) == {"qemu-storage-daemon", "nbdkit", "livedisk"}
    assert all(figure > 0 for figures in samples.values() for figure in figures)
    assert set(found["workloads"]["chain-8-randread-32"]["samples"]) == {"qemu-storage-daemon", "livedisk"}
    assert "raw, 4 KiB random read, depth 1 |" in done.stdout
    titles = [element.text for element in ET.parse(drawing).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 5, "a bar for each figure"


def test_bench_names_the_workload_it_does_not_know() -> None:
    done = run([sys.executable, BENCH, "--only=frobnicate"], expect=2)
    assert "frobnicate" in done.stderr


@pytest.mark.slow
def test_bench_of_jobs_measures_copies_and_what_the_guest_is_left(tmp_path: Path) -> None:
    data = tmp_path / "jobs.json"
    only = ["--only=mirror-raw-qcow2", "--only=stream-raw", "--only=commit-qcow2-raw", "--only=backup-raw"]
    arguments = ["--jobs", "--quick", "--seconds=0.5", "--size=32", "--markdown", f"--json={data}", f"--dir={tmp_path}"]
    done = run([sys.executable, BENCH, *arguments, *only], timeout=180)
    rows = json.loads(data.read_text())["rows"]
    assert {"mirror-raw-qcow2", "mirror-raw-qcow2-randwrite", "stream-raw-qcow2", "commit-qcow2-raw"} <= set(rows)
    for name, row in rows.items():
        for daemon in ("qemu-storage-daemon", "livedisk"):
            (sample,) = row[daemon]
            assert sample["rate"] > 0
            assert (sample["iops"] > 0) == name.endswith(("randread", "randwrite"))
    assert "| mirror, raw to qcow2 |" in done.stdout


@pytest.mark.slow
def test_bench_of_bitmaps_measures_commands_and_what_the_guest_keeps(tmp_path: Path) -> None:
    data = tmp_path / "bitmaps.json"
    arguments = [
        "--bitmaps",
        "--quick",
        "--seconds=0.2",
        "--size=32",
        "--markdown",
        f"--json={data}",
        f"--dir={tmp_path}",
    ]
    done = run([sys.executable, BENCH, *arguments], timeout=240)
    rows = json.loads(data.read_text())["rows"]
    for title in (
        "add a persistent bitmap",
        "load both (open the image)",
        "qcow2, 4 KiB random write, four persistent bitmaps",
    ):
        for daemon in ("qemu-storage-daemon", "livedisk"):
            assert all(sample["seconds"] > 0 for sample in rows[title][daemon])
    # Generous: what a bitmap of 2 MiB may cost at the most, not what it does.
    assert all(sample["memory"] < 20 << 20 for title in rows for sample in rows[title]["livedisk"])
    assert all(sample["iops"] > 0 for sample in rows["raw, 4 KiB random write, four bitmaps"]["livedisk"])
    assert "| merge one into another |" in done.stdout
