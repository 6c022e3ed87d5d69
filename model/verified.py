"""Old name of `model.bundle`."""

from model.bundle import *  # noqa: F403
