"""What the caller of a job is told, once, however often the job begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.engine.protocol import Drawn, Preview

# A call that `EngineClient.run` makes to its caller: the parameter's name, and with what.
Call = tuple[str, tuple[Any, ...]]


@dataclass(slots=True)
class Telling:
    """hooks: the caller's, by their names as parameters of `EngineClient.run`."""

    hooks: Mapping[str, Callable[..., object]]
    _told: set[object] = field(default_factory=set)
    _previewed: dict[int, int] = field(default_factory=dict)

    def tell(self, call: Call) -> None:
        """Hands on what is new: a preview later than those of its image so far, a drawn image or anything else the first time."""
        name, args = call
        if (hook := self.hooks.get(name)) and self._is_news(name, args):
            hook(*args)

    def _is_news(self, name: str, args: tuple[Any, ...]) -> bool:
        match args:
            case (Preview(number=number, image=image),):
                latest = self._previewed.get(image.index, -1)
                self._previewed[image.index] = max(latest, number)
                return number > latest
            case (Drawn(image=image),):
                news: object = (name, image.index)
            case _:
                news = name
        told = news in self._told
        self._told.add(news)
        return not told
