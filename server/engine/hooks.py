"""A job's callbacks, and their protection from a job that begins again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from server.engine.latency_model import Forecast
from server.engine.messages import Drawn, Preview

HookName = Literal["on_admitted", "on_started", "on_preview", "on_drawn"]


@dataclass(frozen=True, slots=True)
class Hooks:
    """The callbacks of a job, called on the event loop while `Engine.run` waits.

    on_admitted: before the first wait, unless the job is rejected. on_started: once, when a worker
    starts the job. on_preview: with those of `job.previews` that are made in time, each image's in
    order and none twice. on_drawn: with each image of a job that is `early`, in any order and none
    twice.
    """

    on_admitted: Callable[[Forecast], object] | None = None
    on_started: Callable[[], object] | None = None
    on_preview: Callable[[Preview], object] | None = None
    on_drawn: Callable[[Drawn], object] | None = None

    @property
    def names(self) -> set[HookName]:
        """The hooks that there are."""
        return {each.name for each in fields(self) if getattr(self, each.name)}  # type: ignore[misc]


NO_HOOKS = Hooks()


@dataclass(slots=True)
class ReplayFilter:
    """Calls a job's hooks, without the calls that a replay repeats."""

    hooks: Hooks
    _called: set[object] = field(default_factory=set)
    # The number of each image's latest preview: a replay begins with the first.
    _latest_preview: dict[int, int] = field(default_factory=dict)

    def call(self, name: HookName, *args: Any) -> None:
        """Call the hook if there is one and the call is new.

        A preview is new if it is later than its image's last one, any other call the first time.
        """
        if (hook := getattr(self.hooks, name)) and self._is_new(name, args):
            hook(*args)

    def _is_new(self, name: HookName, args: tuple[Any, ...]) -> bool:
        match args:
            case (Preview(number=number, image=image),):
                latest = self._latest_preview.get(image.index, -1)
                self._latest_preview[image.index] = max(latest, number)
                return number > latest
            case (Drawn(image=image),):
                key: object = (name, image.index)
            case _:
                key = name
        is_new = key not in self._called
        self._called.add(key)
        return is_new
