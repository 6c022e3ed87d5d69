"""Write the results of one part of the program, to a file that is complete after every row.

A run that is stopped keeps its rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    """Write the whole file or none of it, so that a stopped run leaves no half of one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


class Results:
    """directory: where `PART.json` lies; None: it is not written."""

    def __init__(self, part: str, directory: Path | None) -> None:
        self.part, self.rows = part, list[Row]()
        self._file = None if directory is None else directory / f"{part}.json"

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{self.part}: "
            + ", ".join(f"{key} {value}" for key, value in row.items() if _is_short(value)),
            file=sys.stderr,
            flush=True,
        )
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self.rows)

    def table(self) -> Table:
        """Return all short values of all rows, a column for each name."""
        columns = list(
            dict.fromkeys(
                key for row in self.rows for key, value in row.items() if _is_short(value)
            )
        )
        table = Table(title=self.part, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(str(row.get(column, "")) for column in columns))
        return table


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float | bool)
