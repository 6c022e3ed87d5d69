"""A clock for asyncio tests that jumps to the next timer whenever nothing else is left to do.

    @virtual_time
    async def test_a_timeout():
        await asyncio.sleep(3600)  # takes no time
        assert time.monotonic() == START + 3600

Nothing in such a test may wait for another thread or process.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

# Not 0, which no real clock of a running machine tells.
START = 1000.0


class _JumpingSelector(selectors.SelectSelector):
    """Waits for no time; counts what it would have waited. Raises RuntimeError if it would wait
    without end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("the test waits for something that never happens")
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is the sum of the waits asked for."""

    def __init__(self) -> None:
        self.selector = _JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on such a loop, with `time.monotonic` on the same clock."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with (
            pytest.MonkeyPatch.context() as patch,
            asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
        ):
            patch.setattr(time, "monotonic", runner.get_loop().time)
            runner.run(test(*args, **kwargs))

    return run


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)
