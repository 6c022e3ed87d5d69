"""What every request handler needs, made once per app."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fastapi import Request

from model.config import BundleConfig
from server.engine.face import Engine
from server.engine.protocol import Job
from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.errors import ApiError
    from server.api.images.decode import Decoder


@dataclass(frozen=True, slots=True)
class AppState:
    """models: the served bundles by name, the default first. started_at: Unix seconds.

    running: by client and request id, what ends each such request with an error.
    """

    settings: Settings
    metrics: Metrics
    engine: Engine
    models: dict[str, BundleConfig]
    decoder: Decoder
    started_at: int = field(default_factory=lambda: int(time.time()))
    running: dict[tuple[str, str], list[asyncio.Future[ApiError]]] = field(default_factory=dict)


def state_of(request: Request) -> AppState:
    return cast(AppState, request.app.state.paellera)


def request_id_of(request: Request) -> str:
    """The client's `X-Request-Id`, or the one the middleware made."""
    return cast(str, request.state.request_id)


def client_of(request: Request) -> str:
    """The name of the API key it came with, or what stands for everybody."""
    return cast(str, request.state.client)


def note(request: Request, job: Job) -> None:
    """Has the request's line in the log say what was asked: the prompts, too, if the settings want them there."""
    asked = {"job": job.id, "model": job.model, "images": len(job.seeds), "seed": job.seeds[0], "size": f"{job.width}x{job.height}"}
    prompts = {"prompts": job.prompts, "negative_prompt": job.negative_prompt} if state_of(request).settings.log_prompts else {}
    request.state.asked = {**asked, "steps": job.sampling.steps, **prompts}
