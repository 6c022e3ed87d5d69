"""The application for Ray Serve: `serve run server.ray_app:app min_replicas=2 max_replicas=8`."""

from server.ray_serve.app import app

__all__ = ["app"]
