"""Old name of `model.networks.denoiser_v3`."""

from model.networks.denoiser_v3 import *  # noqa: F403
