"""Re-export `model.networks.prior` under the name that other projects import."""

from model.networks.prior import *  # noqa: F403
