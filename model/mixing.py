"""Old names of `model.conditioning`."""

from model.conditioning import Conditioning as Shown
from model.conditioning import interpolate as between
from model.conditioning import lerp, mean, slerp
from model.config import Interpolation as Mode

__all__ = ["Mode", "Shown", "between", "lerp", "mean", "slerp"]
