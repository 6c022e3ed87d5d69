"""Old name of `model.networks.layers`."""

from model.networks.layers import *  # noqa: F403
