"""Pickles that show whether they were opened."""

from __future__ import annotations

from pathlib import Path


class Explosive:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))
