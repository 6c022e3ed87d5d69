"""Old name of the v1 networks."""

from model.networks.denoiser_v1 import *  # noqa: F403
from model.networks.vqgan_v1 import VQGANV1 as VQGANV1
