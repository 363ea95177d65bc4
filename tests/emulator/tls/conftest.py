"""Folders of certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import certificates


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good certificates."""
    return certificates.folder(tmp_path_factory.mktemp("tls") / "good")
