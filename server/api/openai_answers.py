"""What the engine made of a plan, in OpenAI's words: one JSON answer, or its events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request, Response

from server.api import responses
from server.api.images.encode import encode
from server.api.jobs import Plan
from server.api.openai_schemas import ImagesFields
from server.api.sse import Comment, Emit, Event, Later
from server.api.state import state_of
from server.engine.protocol import Finished, Preview


@dataclass(frozen=True, slots=True)
class Answer:
    request: Request
    asked: ImagesFields
    plan: Plan

    async def respond(self, finished: Finished) -> Response:
        contents, stages = await self._encode(finished)
        headers = responses.headers_of(self.plan, finished, stages)

        def body() -> bytes:
            data = [self._entry(i, content) for i, content in enumerate(contents)]
            return json.dumps({"created": int(time.time()), "data": data, "usage": self._usage(len(data)), **self._effective}).encode()

        return Response(await asyncio.to_thread(body), media_type="application/json", headers=headers)

    async def tell(self, events: str, emit: Emit) -> None:
        """Runs the plan's job and tells it as events named `events`.partial_image and `events`.completed, one of these for each picture."""
        finished = await state_of(self.request).engine.run(
            self.plan.job,
            # OpenAI has no event for it, but the answer's head is not to wait for the first picture.
            on_admitted=lambda _: emit(Comment("queued")),
            on_preview=lambda preview: emit(Later(lambda: self._partial(f"{events}.partial_image", preview), preview.image.index)),
        )
        contents, _ = await self._encode(finished)
        for index, content in enumerate(contents):
            emit(Later(partial(self._event, f"{events}.completed", content, index=index, usage=self._usage(1))))

    def _partial(self, name: str, preview: Preview) -> Event:
        # In the format that was asked for: clients save them under that name.
        content = encode(self.plan.finish(preview.image), self.asked.file_format, self.asked.file_quality, {})
        return self._event(name, content, index=preview.image.index, partial_image_index=preview.number)

    def _event(self, name: str, content: bytes, **own: Any) -> Event:
        """index, of the request's picture, is an extension: there may be several."""
        file = {"type": name, "b64_json": base64.b64encode(content).decode(), "created_at": int(time.time())}
        return Event(name, file | self._effective | own)

    async def _encode(self, finished: Finished) -> tuple[list[bytes], dict[str, float]]:
        """The pictures' files, and the seconds of every stage."""
        format, quality = self.asked.file_format, self.asked.file_quality
        contents, seconds = await responses.encode_all(state_of(self.request), self.plan, finished, format, quality)
        return contents, responses.stages_of(finished, seconds)

    def _entry(self, index: int, content: bytes) -> dict[str, Any]:
        return {"b64_json": base64.b64encode(content).decode(), "seed": self.plan.job.seeds[index]}

    @property
    def _effective(self) -> dict[str, str]:
        return {
            "size": f"{self.plan.size[0]}x{self.plan.size[1]}",
            "quality": self.asked.effective_quality,
            "background": "opaque",
            "output_format": self.asked.file_format,
        }

    def _usage(self, images: int) -> dict[str, Any]:
        """Tokens. text: the prompt's bytes. image: the VQGAN's, and one for each picture that CLIP embeds."""
        job = self.plan.job
        tokens = job.width * job.height // state_of(self.request).models[job.model].vqgan.downscale ** 2
        text = sum(len(prompt.encode("utf-8", "replace")) for prompt in job.prompts)
        seen = len(job.references) + (tokens if job.canvas else 0)
        return {
            "input_tokens": text + seen,
            "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
            "output_tokens": images * tokens,
            "total_tokens": text + seen + images * tokens,
        }
