"""Spread the retries of rejected clients, so that they do not return together."""

from __future__ import annotations

import math

# The OpenAI SDKs ignore a longer Retry-After, seconds. Later slots would also let a flood of
# rejected requests push the next client's retry ever further away.
HORIZON_S = 60.0
# Retry-after-ms counts in these, seconds.
RESOLUTION_S = 0.001


class RetrySlots:
    """Times at which rejected clients should retry, each later than the one before."""

    def __init__(self) -> None:
        self._last = -math.inf

    def take(self, earliest_s: float, spacing_s: float, now: float) -> float:
        """Return the seconds after which a client that is rejected now should retry.

        Beyond `HORIZON_S` from now, the slots begin again with the earliest.

        Args:
            earliest_s: seconds until there should be room for one more request.
            spacing_s: seconds that the rejected request will take of the server.
            now: monotonic seconds.
        """
        earliest = now + earliest_s
        slot = max(earliest, self._last + max(spacing_s, RESOLUTION_S))
        if slot > now + HORIZON_S:
            slot = earliest
        self._last = slot
        return slot - now
