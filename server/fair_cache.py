"""A cache bounded in bytes and time, shared fairly between the owners of its values."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    """A value. size: bytes; expires_at: seconds of the cache's clock."""

    value: Value
    size: int
    owner: str
    expires_at: float


class FairCache(Generic[Key, Value]):
    """Values by key, each of an owner.

    When there is no room, the owner that holds most loses its oldest values first, so that nobody
    can displace the values of those that hold less. All methods may be called from any thread.
    """

    def __init__(
        self, limit: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create an empty cache.

        Args:
            limit: bytes of all values and reservations together.
            lifetime_s: seconds after which a value is gone.
            clock: seconds.
        """
        self.limit = limit
        self._lifetime_s, self._clock = lifetime_s, clock
        self._lock = threading.Lock()
        # The oldest first, as in each owner's keys.
        self._entries: dict[Key, _Entry[Value]] = {}
        self._keys: dict[str, dict[Key, None]] = {}
        self._held: Counter[str] = Counter()
        self._reserved = 0

    @property
    def bytes(self) -> int:
        """Bytes of all values and reservations."""
        return self._held.total() + self._reserved

    def get(self, key: Key) -> tuple[Value, float] | None:
        """Return a value and the seconds that it is left, or None."""
        with self._lock:
            self._expire()
            entry = self._entries.get(key)
            return None if entry is None else (entry.value, entry.expires_at - self._clock())

    def add(self, owner: str, values: Mapping[Key, tuple[Value, int]]) -> bool:
        """Keep new values, all or none; return whether there was room.

        Args:
            owner: the holder.
            values: value and bytes by key.
        """
        size = sum(size for _, size in values.values())
        with self._lock:
            self._expire()
            if not self._make_room(owner, size):
                return False
            expires_at = self._clock() + self._lifetime_s
            for key, (value, size_of_one) in values.items():
                self._remove(key)
                self._entries[key] = _Entry(value, size_of_one, owner, expires_at)
                self._keys.setdefault(owner, {})[key] = None
                self._held[owner] += size_of_one
            return True

    def reserve(self, owner: str, size: int) -> bool:
        """Count bytes that are no value yet; return whether there was room."""
        with self._lock:
            self._expire()
            if not self._make_room(owner, size):
                return False
            self._reserved += size
            return True

    def release(self, size: int) -> None:
        """Stop counting reserved bytes."""
        with self._lock:
            self._reserved -= size

    def expire(self) -> None:
        """Remove the values whose time is over."""
        with self._lock:
            self._expire()

    def _expire(self) -> None:
        now = self._clock()
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest].expires_at > now:
                return
            self._remove(oldest)

    def _make_room(self, owner: str, size: int) -> bool:
        """Remove values until `size` more bytes of the owner fit; return whether they do."""
        if size + self._reserved > self.limit:
            return False
        while self.bytes + size > self.limit:
            largest = max(self._keys, key=lambda each: self._held[each] + size * (each == owner))
            self._remove(next(iter(self._keys[largest])))
        return True

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._held[entry.owner] -= entry.size
        keys = self._keys[entry.owner]
        del keys[key]
        if not keys:
            del self._keys[entry.owner], self._held[entry.owner]
