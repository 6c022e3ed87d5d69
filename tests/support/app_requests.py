"""A request as the app's functions get it, and work that one cancels."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from fastapi import Request

from server.api.state import (
    RequestState,
    add_request_state,
)
from server.settings import Settings

Received = asyncio.Queue[dict[str, Any]]


def request_of(
    received: Received | None = None, client: str | None = None, **settings: Any
) -> Request:
    """A request with the id `mine`. received: what its connection brings, by default nothing."""
    state = SimpleNamespace(running={}, settings=Settings(**settings))
    app = SimpleNamespace(state=SimpleNamespace(paellera=state))
    scope = {"type": "http", "app": app, "client": ("192.0.2.7", 1234), "headers": []}
    add_request_state(scope, RequestState("mine", client))
    return Request(scope, (received or asyncio.Queue()).get)


async def endless(ended: list[str]) -> None:
    """Work that takes a moment to end when it is cancelled, and then says so."""
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        ended.append("work")
