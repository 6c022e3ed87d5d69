"""What every request handler needs, made once per app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from model.config import BundleConfig
from server.engine.client import EngineClient
from server.metrics import Metrics
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class AppState:
    """models: the served bundles by name, the default first."""

    settings: Settings
    metrics: Metrics
    engine: EngineClient
    models: dict[str, BundleConfig]


def state_of(request: Request) -> AppState:
    return cast(AppState, request.app.state.paellera)


def request_id_of(request: Request) -> str:
    """The client's `X-Request-Id`, or the one the middleware made."""
    return cast(str, request.state.request_id)
