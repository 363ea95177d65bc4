"""Fixtures and options that the whole suite shares.

``--quick`` leaves out what is marked slow, ``--soak`` adds what is marked soak. Neither skips: what is left out is
not collected, so that a skip in the report always means that somebody wrote one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kit.places import short_folder

# The machine is shared and slow at times, so no deadline per example; a hang is pytest-timeout's business.
_FRAME = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _FRAME, max_examples=100)
settings.register_profile("quick", _FRAME, max_examples=20)
settings.register_profile("soak", _FRAME, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("livedisk")
    group.addoption("--quick", action="store_true", help="leave out tests marked slow, fewer random examples")
    group.addoption("--soak", action="store_true", help="also run tests marked soak, many more random examples")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and config.getoption("--soak"):
        raise pytest.UsageError("--quick and --soak exclude each other")
    name = "quick" if config.getoption("--quick") else "soak" if config.getoption("--soak") else "default"
    # An explicit --hypothesis-profile wins.
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("soak") and not config.getoption("--soak"))
        or (item.get_closest_marker("slow") and config.getoption("--quick"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets."""
    with short_folder() as folder:
        yield folder
