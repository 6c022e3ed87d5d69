"""Old name of `model.rows`."""

from model.rows import *  # noqa: F403
