"""Figures as people read them: bytes, seconds, bars."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(count: float) -> str:
    """Three digits and a binary unit: ``1.50 GiB``."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    if unit == 0:
        return f"{count:.0f} B"
    return f"{count:.{2 if count < 10 else 1 if count < 100 else 0}f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(share: float, width: int, marks: str) -> str:
    """A bar of ``width`` columns, of which ``share`` (0 to 1) is full; ``marks``: a full column and an empty one."""
    full = min(width, max(0, int(share * width)))
    return marks[0] * full + marks[1] * (width - full)
