"""Old name of `model.conditioning`."""

from model.conditioning import *  # noqa: F403
