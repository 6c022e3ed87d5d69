"""Cache encoded prompts, encoded images and results of the prior, up to a number of bytes."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar, cast

from torch import Tensor

from model.batch_encoder import Cached
from server.engine.messages import Count

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class PromptCache:
    """A least-recently-used cache, bounded by bytes; a `model.batch_encoder.EncodingCache`.

    capacity: bytes of all entries together; a larger entry is not kept. size_of: bytes of an entry,
    by its key and its value. held: bytes now. counters: where hits and misses are counted.
    """

    def __init__(
        self, capacity: int, size_of: Callable[[Hashable, object], int], counters: Counter[Count]
    ) -> None:
        self.capacity, self.held = capacity, 0
        self._size_of, self._counters = size_of, counters
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> list[tuple[Hashable, object]]:
        """Return all keys and values, the least recently used first."""
        return list(self._values.items())

    def fetch(
        self, kind: Cached, keys: Sequence[K], compute: Callable[[list[K]], list[V]]
    ) -> list[V]:
        """Return the keys' values; compute the missing ones in one call, each once.

        Keys of different kinds must differ.
        """
        values = {key: cast(V, self._values[key]) for key in keys if key in self._values}
        missing = [key for key in dict.fromkeys(keys) if key not in values]
        self._counters["prompt_cache_hits", kind] += len(keys) - len(missing)
        self._counters["prompt_cache_misses", kind] += len(missing)
        if missing:
            values.update(zip(missing, compute(missing), strict=True))
        for key in keys:
            self._use(key, values[key])
        return [values[key] for key in keys]

    def _use(self, key: Hashable, value: object) -> None:
        """Mark the value as the last one used, and evict others if there is no room."""
        if key not in self._values:
            size = self._size_of(key, value)
            if size > self.capacity:
                return
            self._values[key] = value
            self.held += size
        self._values.move_to_end(key)
        while self.held > self.capacity:
            self.held -= self._size_of(*self._values.popitem(last=False))


def leaves(value: object) -> Iterator[object]:
    """Yield everything in a tree of dataclasses and tuples."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a tree of dataclasses and tuples."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def tensor_bytes(value: object) -> int:
    """Return the bytes of the memory that the tensors in a value hold."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(value))


def entry_bytes(key: Hashable, value: object) -> int:
    """Return the bytes of a cached value's tensors and of the texts in its key."""
    return tensor_bytes(value) + sum(
        sys.getsizeof(leaf) for leaf in leaves(key) if isinstance(leaf, str)
    )
