"""Re-export `model.networks.denoiser_v3` under the name that other projects import."""

from model.networks.denoiser_v3 import *  # noqa: F403
