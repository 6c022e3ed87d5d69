"""Old name of `server.engine.cpu_threads`, until nothing imports it."""

from server.engine.cpu_threads import *  # noqa: F403
