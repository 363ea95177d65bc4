"""kill -9 of a process that writes: the image passes a check but for leaks, and all that was flushed is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.peers import run
from kit.qemu import create, qemu_img

SIZE = 16 << 20
BLOCK = 4096
HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("options", ["", "cluster_size=512", "lazy_refcounts=on", "extended_l2=on"])
def test_kill_9_loses_nothing_that_was_flushed(options: str, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE, options=options)
    child = subprocess.Popen(
        [sys.executable, str(HERE / "kill_child.py"), str(path), "7"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    time.sleep(0.7)
    child.send_signal(signal.SIGKILL)
    lines += child.stdout.readlines()
    child.wait()
    child.stdout.close()
    assert len(lines) > 5
    flushed: dict[int, int] = {}
    for line in lines:
        version, *places = map(int, line.split())
        if line.endswith(b"\n"):
            flushed |= dict.fromkeys(places, version)
    if path.read_bytes()[79] & 1:
        run(["qemu-img", "check", "-r", "all", path], expect=None)
    report = run(["qemu-img", "check", path], expect=None)
    assert report.returncode in (0, 3), report.stdout + report.stderr
    qemu_img("convert", "-O", "raw", path, tmp_path / "image.raw")
    found = (tmp_path / "image.raw").read_bytes()
    last = len(lines) + 1
    for place, version in flushed.items():
        if place * BLOCK >= SIZE // 2:
            continue  # may have been discarded since
        number = int.from_bytes(found[place * BLOCK : place * BLOCK + 8], "big")
        assert version <= number <= last, f"block {place}: version {number}, flushed was {version}"
