"""Define the twelve named colours of the scenes, and distances between colours (CIELAB)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 28, 36),
    "orange": (252, 138, 16),
    "yellow": (252, 222, 40),
    "green": (36, 156, 60),
    "cyan": (56, 208, 218),
    "blue": (32, 72, 214),
    "purple": (132, 48, 170),
    "pink": (252, 146, 192),
    "brown": (118, 70, 34),
    "black": (14, 14, 16),
    "white": (250, 250, 250),
    "gray": (136, 136, 138),
}
NAMES: tuple[str, ...] = tuple(COLOURS)

_XYZ_FROM_LINEAR_SRGB = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_D65 = _XYZ_FROM_LINEAR_SRGB.sum(axis=1)


def lab(rgb: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Turn sRGB of 0…255 `[…,3]` into CIELAB (D65) `[…,3]`."""
    srgb = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _XYZ_FROM_LINEAR_SRGB.T / _D65
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x = f[..., 0]
    y = f[..., 1]
    z = f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


PALETTE_LAB: npt.NDArray[np.float64] = lab(list(COLOURS.values()))  # [12, 3]


def distance(rgb: npt.ArrayLike, other: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return ΔE (CIE 1976) between colours `[…,3]` of 0…255: `[…]`.

    About 2 is just visible; two palette colours are 30 or more apart.
    """
    return np.asarray(np.linalg.norm(lab(rgb) - lab(other), axis=-1))


def nearest(rgb: npt.ArrayLike) -> str:
    """Return the name of the palette colour closest to one colour `[3]` of 0…255."""
    return NAMES[int(np.argmin(np.linalg.norm(PALETTE_LAB - lab(rgb), axis=-1)))]
