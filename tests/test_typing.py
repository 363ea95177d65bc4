"""ruff and mypy --strict find nothing, on what is installed and on the test kit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kit.peers import ROOT, python_scripts


def tool(name: str, *arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", name, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{name}:\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    tool("ruff", "check", ".", *python_scripts(), cwd=ROOT)


@pytest.mark.timeout(600)
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    # mypy does not know the import hook of an editable installation: give it a folder of the packages' shape.
    packages = tmp_path / "livedisk"
    packages.mkdir()
    for name in ("nbd", "emulator", "jobs"):
        (packages / name).symlink_to(ROOT / name)
    (tmp_path / "kit").symlink_to(ROOT / "tests" / "kit")
    (tmp_path / "benchmark").symlink_to(ROOT / "scripts" / "benchmark")
    options = ["--strict", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    tool("mypy", *options, "livedisk", "kit", "benchmark", cwd=tmp_path)
