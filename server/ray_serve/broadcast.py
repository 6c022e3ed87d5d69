"""Questions to all replicas of a deployment: for their reports, and for a client's answer.

Handles are Ray's; nothing here imports Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from starlette.responses import Response

from server.api.errors import from_engine
from server.engine.errors import WorkerLost
from server.engine.supervisor import WorkerStatus

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
# Reports are kept for so long while newer ones are missing: one replica that does not answer in
# time makes Ray withhold the answers of all. Longer than two polls that time out.
KEPT_S = 15.0


@dataclass(frozen=True, slots=True)
class Report:
    """A replica's report of every second. status: None if it has no engine."""

    replica: str
    status: WorkerStatus | None
    metrics: list[Metric]


async def ask_all(handle: Any, method: str, *args: Any) -> list[Any] | None:
    """Return what the replicas of a deployment answer, or raise; None if Ray has no answers."""
    try:
        return await handle.broadcast(method, *args).results_async(
            timeout_s=TIMEOUT_S, return_exceptions=True
        )
    except Exception as error:
        fields = {"question": method, "reason": repr(error)[:200]}
        log.warning("replica answers missing", extra={"fields": fields})
        return None


class Reports:
    """The latest reports of the replicas of several deployments."""

    def __init__(self, *handles: Any) -> None:
        """Create the list, empty. handles: the deployments'."""
        self._handles = handles
        self._latest: dict[int, tuple[float, list[Report]]] = {}

    async def poll(self) -> None:
        """Ask all deployments at once. A poll that fails leaves the reports before it."""
        answers = await asyncio.gather(*(ask_all(handle, "report") for handle in self._handles))
        for number, each in enumerate(answers):
            if each is not None:
                reports = [answer for answer in each if isinstance(answer, Report)]
                self._latest[number] = time.monotonic(), reports

    @property
    def recent(self) -> list[Report]:
        """The reports that are no older than `KEPT_S`, in the order of the deployments."""
        since = time.monotonic() - KEPT_S
        kept = (self._latest[number] for number in sorted(self._latest))
        return [report for at, reports in kept if at >= since for report in reports]


def best_answer(answers: Sequence[object]) -> Response:
    """Return the replicas' answer with the lowest status, or 503 if there is none.

    answers: (status, headers, content) of each replica, or its exception.
    """
    given = [answer for answer in answers if isinstance(answer, tuple)]
    if not given:
        return from_engine(WorkerLost("no replica answered")).response()
    status, headers, content = min(given, key=lambda answer: answer[0])
    return Response(content, status, headers)
