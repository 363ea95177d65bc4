"""Plugins are found by reading folders; importlib.metadata is asked whether that is right. The version."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from kit.livedisk import livedisk
from livedisk.emulator.qmp import registry

MODULE = """
made = []

class Plugin:
    @staticmethod
    def start():
        made.append("started")
"""


def test_the_version_is_the_installed_one() -> None:
    assert livedisk("--version").stdout.split() == ["livedisk", version("livedisk")]
    assert livedisk("daemon", "-version").stdout.split() == ["livedisk", "daemon", version("livedisk")]


def test_entry_points_are_those_of_importlib(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any group serves to compare; this one has members in every environment that runs these tests.
    monkeypatch.setattr(registry, "PLUGIN_GROUP", "console_scripts")
    ours = set(registry._declared_plugins(sys.path))
    # Extras ("[tui]") say what to install, not what to import.
    theirs = {(point.name, point.value.partition("[")[0].strip()) for point in entry_points(group="console_scripts")}
    assert ("livedisk", "livedisk.emulator.cli:main") in ours
    assert ours == theirs


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module and an entry point to a function in it."""
    (tmp_path / "ld_sample_plugin.py").write_text(MODULE)
    declaration = tmp_path / "sample-1.dist-info" / "entry_points.txt"
    declaration.parent.mkdir()
    declaration.write_text("[other]\nx = none\n\n[livedisk.plugins]\n# why\nsample = ld_sample_plugin:Plugin.start\n")
    monkeypatch.syspath_prepend(tmp_path)
    return declaration


def test_a_plugin_is_imported_and_its_function_called_once(plugin: Path) -> None:
    registry.load_plugins()
    assert sys.modules["ld_sample_plugin"].made == ["started"]


def test_what_a_plugin_raises_is_not_passed_over(plugin: Path) -> None:
    plugin.write_text("[livedisk.plugins]\nbroken = ld_no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="ld_no_such_module"):
        registry.load_plugins()
