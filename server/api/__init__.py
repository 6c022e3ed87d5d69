"""The HTTP API: validates requests, plans jobs for the engine, answers with images."""

from server.api.app import create_app

__all__ = ["create_app"]
