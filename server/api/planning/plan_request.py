"""Plan a request: at once, or in one of the decoder's threads if it has images.

Its images wait for a thread (`server/api/images/admission.py`) until the deadline, or until the
client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from model.config import Operation
from server.api.images.admission import Uploads
from server.api.planning.draft import draft
from server.api.planning.operations import OPERATIONS
from server.api.planning.plan import Plan
from server.api.planning.work import rows_of
from server.api.schemas import AnyFormat, GenerateRequest, SamplingFields
from server.api.state import app_state, log_job, request_state, unless_cancelled
from server.metrics import Metrics


async def plan_request(
    request: Request,
    fields: SamplingFields,
    operation: Operation,
    output: AnyFormat = "png",
    parts: int = 1,
) -> Plan:
    """Return the plan of a request, and note its job for the log.

    Args:
        request: the HTTP request, whose end ends the planning.
        fields: its fields.
        operation: what they ask for.
        output: format of the answer's images.
        parts: plans that the request has; each may be that part of a request's work.

    Raises:
        ApiError: 404 unknown weights, 400 unsupported by them, 413 and 422 invalid images or
            fields, 499 the client left.
        EngineError: the decoder's, the engine's or the encoder's queue is full, or the deadline
            passed.
    """
    state, scope = app_state(request), request_state(request).client or ""
    settings = state.settings
    if parts > 1:
        part = settings.max_request_work // parts
        settings = settings.model_copy(update={"max_request_work": part})
    drafted = draft(fields, operation, state.models, settings, output, scope)
    planner = partial(OPERATIONS[operation][1], drafted.request, drafted)
    state.encoder.check_room(rows_of(fields))
    if isinstance(fields, GenerateRequest) and not fields.regions:
        planned = planner(Uploads(state.decoder.limits))
    else:
        files = list(uploaded_files(fields))
        if files:
            # Decoding would be in vain. The engine checks again when it is done.
            state.engine.check_room(rows_of(fields))
        work = state.decoder.run(planner, files, drafted.deadline)
        planned = await unless_cancelled(request, _count_if_cancelled(work, state.metrics))
    log_job(request, planned.job)
    return planned


async def _count_if_cancelled(work: Coroutine[Any, Any, Plan], metrics: Metrics) -> Plan:
    try:
        return await work
    except asyncio.CancelledError:
        metrics.cancelled.labels("upload").inc()
        raise


def uploaded_files(value: object, param: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield (param, content) of every image file in a request's fields."""
    match value:
        case bytes():
            yield param, value
        case BaseModel():
            prefix = param and f"{param}."
            for name in type(value).model_fields:
                yield from uploaded_files(getattr(value, name), f"{prefix}{name}")
        case list() | tuple():
            for i, item in enumerate(value):
                yield from uploaded_files(
                    item, param if isinstance(item, bytes) else f"{param}.{i}"
                )
