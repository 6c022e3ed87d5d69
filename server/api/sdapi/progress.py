"""The progress of a client's running request, its preview, and its interruption."""

from __future__ import annotations

import asyncio
import base64

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from server.api.images.encode import encode
from server.api.sdapi.clients import Drawing, clients_of
from server.api.state import app_state, owner_of


async def progress(request: Request) -> Response:
    """Return the progress of the client's oldest running request, with its latest preview."""
    drawings = clients_of(request).drawings(owner_of(request))
    drawing = drawings[0] if drawings else None
    part = drawing.progress if drawing else 0.0
    skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1")
    return JSONResponse(
        {
            "progress": round(part, 4),
            "eta_relative": round(drawing.eta_s, 3) if drawing else 0.0,
            "state": {
                "skipped": False,
                "interrupted": bool(drawing and drawing.interrupted.done()),
                "stopping_generation": False,
                "job": drawing.job if drawing else "",
                "job_count": len(drawings),
                "job_timestamp": drawing.timestamp if drawing else "0",
                "job_no": 0,
                "sampling_step": int(part * drawing.steps) if drawing else 0,
                "sampling_steps": drawing.steps if drawing else 0,
            },
            "current_image": None if skip else await _current_image(request, drawing),
            "textinfo": None,
        }
    )


async def _current_image(request: Request, drawing: Drawing | None) -> str | None:
    """Return the first image's latest preview as a PNG in base64, None if there is none."""
    if drawing is None or drawing.plan is None or not drawing.previews:
        return None
    preview, planned = drawing.previews[min(drawing.previews)], drawing.plan
    if drawing.shown is None or drawing.shown[0] is not preview:
        state = app_state(request)
        marking = state.marker.of_preview(planned.operation)

        def work() -> str:
            content = encode(planned.finish(preview.image), "png", 90, {}, marking=marking)
            return base64.b64encode(content).decode()

        file = asyncio.ensure_future(state.encoder.run(work))
        drawing.shown = preview, file
    # Shared by those that ask meanwhile; any of them may leave.
    return await asyncio.shield(drawing.shown[1])


async def interrupt(request: Request) -> Response:
    """End the client's own running requests."""
    clients_of(request).interrupt(owner_of(request))
    return JSONResponse({})
