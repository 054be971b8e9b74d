"""Tables as text, for terminals, log files and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100
"""Columns of printed text, so that two windows fit side by side on a usual screen."""


def as_text(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Formats rows as a table with lines of at most :data:`WIDTH` characters; long cells are wrapped.

    Args:
        head: a title for each column.
        rows: with a cell for each column. Leading spaces of a cell stay.
        numbers: align all columns but the first on the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for number, title in enumerate(head):
        right = numbers and number > 0
        table.add_column(Text(title), justify="right" if right else "left", no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    file = StringIO()
    Console(file=file, width=WIDTH, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def in_megabytes(nbytes: int) -> str:
    """Formats a number of bytes, with three digits or so: ``1,280 MB``, ``12.8 MB``, ``0.01 MB``."""
    megabytes = nbytes / 1e6
    return f"{megabytes:,.{0 if megabytes >= 100 else 1 if megabytes >= 1 else 2}f} MB"
