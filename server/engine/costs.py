"""Old name of `server.engine.latency_model`, until nothing imports it."""

from server.engine.latency_model import *  # noqa: F403
