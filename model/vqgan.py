"""Re-export `model.networks.vqgan_v3` under the name that other projects import."""

from model.networks.vqgan_v3 import *  # noqa: F403
