"""Replay de-duplication: a caller gets every call once, however often its job is restarted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.engine.messages import Drawn, Preview

# A call of one of the hooks of `EngineClient.run`: the parameter's name and the arguments.
Call = tuple[str, tuple[Any, ...]]


@dataclass(slots=True)
class ReplayFilter:
    """Forwards calls to a caller's hooks, without those that a replay repeats.

    Attributes:
        hooks: by their names as parameters of `EngineClient.run`.
    """

    hooks: Mapping[str, Callable[..., object]]
    _forwarded: set[object] = field(default_factory=set)
    _latest_preview: dict[int, int] = field(default_factory=dict)

    def forward(self, call: Call) -> None:
        """Call the hook if the call is new.

        A preview is new if it is later than its image's last one, any other call the first time.
        """
        name, args = call
        if (hook := self.hooks.get(name)) and self._is_new(name, args):
            hook(*args)

    def _is_new(self, name: str, args: tuple[Any, ...]) -> bool:
        match args:
            case (Preview(number=number, image=image),):
                latest = self._latest_preview.get(image.index, -1)
                self._latest_preview[image.index] = max(latest, number)
                return number > latest
            case (Drawn(image=image),):
                key: object = (name, image.index)
            case _:
                key = name
        is_new = key not in self._forwarded
        self._forwarded.add(key)
        return is_new
