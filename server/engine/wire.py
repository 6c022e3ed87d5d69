"""Old name of `server.engine.messages`, until nothing imports it."""

from server.engine.messages import *  # noqa: F403
