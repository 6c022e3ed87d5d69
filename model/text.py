"""Old name of `model.networks.text_encoders`."""

from model.networks.text_encoders import *  # noqa: F403
