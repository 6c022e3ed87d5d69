"""Old names of `server.engine.messages`, until nothing imports them."""

from model.config import Interpolation
from model.image_request import Edit as Edit
from model.image_request import InputImage
from model.image_request import Keyframe as Keyframe
from model.image_request import Reference as Reference
from model.image_request import Region as Region
from model.image_request import Repaint as Repaint
from server.engine.messages import *  # noqa: F403

Mode = Interpolation
Raster = InputImage
