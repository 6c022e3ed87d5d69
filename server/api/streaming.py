"""A native request told as events: its place in the queue, that it is begun, previews, frames, and what the JSON answer would be.

Previews are what the answer would be if the denoiser stopped there: put together with what is kept, and cropped, as the answer is.
"""

from __future__ import annotations

import base64
import time
from dataclasses import asdict, dataclass

from fastapi import Request

from server.api import responses
from server.api.images.encode import encode
from server.api.jobs import Plan
from server.api.schemas import Format
from server.api.sse import Emit, Event, Later
from server.api.state import request_id_of, state_of
from server.engine.costs import Forecast
from server.engine.protocol import Drawn, Finished, Preview


@dataclass(frozen=True, slots=True)
class Story:
    """format, quality: the pictures' files."""

    request: Request
    plan: Plan
    format: Format
    quality: int

    async def tell(self, emit: Emit) -> None:
        """Runs the plan's job. Raises EngineError."""
        job = self.plan.job
        finished = await state_of(self.request).engine.run(
            job,
            on_admitted=lambda forecast: emit(self._queued(forecast)),
            on_started=lambda: emit(Event("started", {"id": self._id, "steps": job.sampling.steps - job.steps_skipped})),
            on_preview=lambda preview: emit(Later(lambda: self._preview(preview), preview.image.index)),
            on_drawn=lambda drawn: emit(Later(lambda: self._image(drawn))),
        )
        emit(await self._completed(finished))

    @property
    def _id(self) -> str:
        return request_id_of(self.request)

    def _queued(self, forecast: Forecast) -> Event:
        return Event("queued", {"id": self._id, "position": forecast.position, "predicted_s": round(forecast.seconds, 3)})

    def _preview(self, preview: Preview) -> Event:
        skipped = self.plan.job.steps_skipped
        # Nobody keeps a preview, and a JPEG is made in a twelfth of a PNG's time or less and has a sixth of its bytes: docs/log.md.
        format: Format = "jpeg" if self.format == "png" else self.format
        content = encode(self.plan.finish(preview.image), format, self.quality, {})
        steps = {"step": preview.step - skipped, "of": self.plan.job.sampling.steps - skipped}
        file = {"b64_json": base64.b64encode(content).decode(), "width": self.plan.size[0], "height": self.plan.size[1], "format": format}
        return Event("preview", {"index": preview.image.index, **steps, **file})

    def _image(self, drawn: Drawn) -> Event:
        plan, index, began = self.plan, drawn.image.index, time.perf_counter()
        content = encode(plan.finish(drawn.image), self.format, self.quality, plan.parameters(drawn.truncated, index))
        responses.count(state_of(self.request), plan, 1, began)
        return Event("image", {"index": index, **responses.entry(plan, index, content, self.format)})

    async def _completed(self, finished: Finished) -> Later:
        """The JSON answer; of an early job without its pictures, which have been told."""
        state, plan = state_of(self.request), self.plan
        if plan.job.early:
            return Later(lambda: Event("completed", responses.about(self.request, plan, finished, asdict(finished.timings))))
        contents, seconds = await responses.encode_all(state, plan, finished, self.format, self.quality)
        answer = responses.about(self.request, plan, finished, responses.stages_of(finished, seconds))
        return Later(lambda: Event("completed", answer | responses.entries(plan, contents, self.format)))
