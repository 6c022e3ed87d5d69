"""The size at which an image is drawn: the requested one, or the nearest that the weights can."""

from __future__ import annotations

import math

from model.config import BundleConfig
from server.api.errors import invalid_value
from server.api.images.fit import Size
from server.settings import Settings

# Areas in native ones at which the weights still draw well, the least and the most.
NEAREST_AREAS = (0.5, 1.5)


def drawn_size(
    width: int | None, height: int | None, config: BundleConfig, settings: Settings
) -> Size:
    """Return the size at which an image of this width and height is drawn; None: the native one's.

    Raises ApiError 422.
    """
    width, height = width or config.native_size[0], height or config.native_size[1]
    if settings.sizes == "nearest":
        return nearest_size((width, height), config, settings)
    sides = config.sides(settings.max_side)
    for param, pixels in (("width", width), ("height", height)):
        if pixels not in sides:
            allowed = f"must be a multiple of {sides.step} from {sides[0]} to {sides[-1]} pixels"
            raise invalid_value(param, allowed, pixels)
    return width, height


def nearest_side(pixels: int, sides: range) -> int:
    """Return the side next to one of `pixels`."""
    return min(sides, key=lambda side: abs(side - pixels))


def nearest_size(size: Size, config: BundleConfig, settings: Settings) -> Size:
    """Return the (width, height) in pixels at which the weights draw best what was asked for.

    The ratio of the sides comes first, then the native area. The area is within `NEAREST_AREAS` of
    the native one, for which the weights were trained. A size that is possible there is unchanged.
    """
    sides = config.sides(settings.max_side)
    native = config.native_size[0] * config.native_size[1]
    ratio = size[0] / size[1]

    def is_possible(candidate: Size) -> bool:
        area = candidate[0] * candidate[1] / native
        return candidate[1] in sides and NEAREST_AREAS[0] <= area <= NEAREST_AREAS[1]

    def distance(candidate: Size) -> tuple[float, float]:
        width, height = candidate
        return abs(math.log(width / height / ratio)), abs(math.log(width * height / native))

    if size[0] in sides and is_possible(size):
        return size
    candidates = []
    for width in sides:
        # The sides next to the one in the ratio, within the areas.
        lowest, highest = (native * share / width for share in NEAREST_AREAS)
        ideal = min(max(width / ratio, lowest, sides[0]), highest, sides[-1])
        below = sides[0] + int((ideal - sides[0]) // sides.step) * sides.step
        candidates += [(width, below), (width, below + sides.step)]
    return min(filter(is_possible, candidates), key=distance)
