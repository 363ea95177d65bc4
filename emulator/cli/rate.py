"""A rate on the command line: bytes a second, with an optional unit."""

from __future__ import annotations

from typing import Any, Final

import click

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Rate(click.ParamType[int]):
    """``500K``, ``100M``, ``1G``, or bytes; 0 is no limit."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        digits, unit = (value[:-1], _UNITS[value[-1].upper()]) if value[-1:].upper() in _UNITS else (value, 1)
        if not (digits.isascii() and digits.isdigit()) or (unit > 1 and int(digits) == 0):
            self.fail(f"'{value}' is no rate: bytes a second, as 500K, 100M or 1G", param, ctx)
        return int(digits) * unit
