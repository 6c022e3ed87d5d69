"""Old name of `server.engine.interface`, until nothing imports it."""

from server.engine.interface import *  # noqa: F403
