"""Re-export the v3 denoiser and its blocks under the name that other projects import."""

from model.networks.blocks_v3 import *  # noqa: F403
from model.networks.denoiser_v3 import *  # noqa: F403
