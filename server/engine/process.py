"""Old name of `server.engine.supervisor`, until nothing imports it."""

from server.engine.supervisor import *  # noqa: F403
