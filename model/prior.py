"""Old name of `model.networks.prior`."""

from model.networks.prior import *  # noqa: F403
