"""Remembers what was computed, as many bytes of it as allowed; what was used longest ago goes first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar, cast

from server.engine.protocol import Count

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

What = Literal["text", "prior", "picture"]


class Cache:
    """size: bytes of a value. capacity: bytes of all values together; one that is larger by itself is not kept. held: bytes now."""

    def __init__(self, capacity: int, size: Callable[[object], int], counters: Counter[Count]) -> None:
        self.capacity, self.held = capacity, 0
        self._size, self._counters = size, counters
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def fetch(self, what: What, keys: Sequence[K], compute: Callable[[list[K]], list[V]]) -> list[V]:
        """The keys' values; those that are not held are computed, all of them in one call and each once. Keys differ between kinds."""
        values = {key: cast(V, self._values[key]) for key in keys if key in self._values}
        missing = [key for key in dict.fromkeys(keys) if key not in values]
        self._counters["prompt_cache_hits", what] += len(keys) - len(missing)
        self._counters["prompt_cache_misses", what] += len(missing)
        if missing:
            values.update(zip(missing, compute(missing), strict=True))
        for key in keys:
            self._use(key, values[key])
        return [values[key] for key in keys]

    def _use(self, key: Hashable, value: object) -> None:
        """Puts the value in the last place to be given up."""
        if key not in self._values:
            size = self._size(value)
            if size > self.capacity:
                return
            self._values[key] = value
            self.held += size
        self._values.move_to_end(key)
        while self.held > self.capacity:
            self.held -= self._size(self._values.popitem(last=False)[1])
