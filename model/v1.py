"""Re-export the v1 networks under the name that other projects import."""

from model.networks.denoiser_v1 import *  # noqa: F403
from model.networks.vqgan_v1 import VQGANV1 as VQGANV1
