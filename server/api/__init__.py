"""The HTTP side: what is asked is checked here, and what the engine makes of it is put into pictures."""

from server.api.app import create_app

__all__ = ["create_app"]
