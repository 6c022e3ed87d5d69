"""Old name of `model.networks.vqgan_v3`."""

from model.networks.vqgan_v3 import *  # noqa: F403
