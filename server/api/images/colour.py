"""Colours of uploaded images to sRGB, by ICC profiles and what stands for them in PNG and AVIF.

A profile is a stranger's program for LittleCMS: its size is bounded, and the elements that could
make it long (multiProcessElements) are hidden from it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageCms

from server.api.images import ImageFile

# Profiles of printing presses have 0.5 to 3 MB, those of cameras and screens at most 20 kB.
MAX_PROFILE_BYTES = 4 * 2**20
HEADER_BYTES = 128
MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}

# Chromaticities x, y of white, red, green and blue.
SRGB: tuple[float, ...] = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
# By the code points of ITU-T H.273; white is D65 but for 11, DCI-P3.
PRIMARIES = {
    1: SRGB,
    5: (0.3127, 0.329, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (0.3127, 0.329, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
# Exponent, scale, offset, slope of the linear part and its end (ICC parametric curve 3).
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
# Exponents of transfer functions; None is that of sRGB. Screens show those of video by 2.4
# (ITU-R BT.1886).
SRGB_TRANSFER = 13
VIDEO_TRANSFERS = (1, 6, 14, 15)
TRANSFERS: dict[int, float | None] = {
    **dict.fromkeys(VIDEO_TRANSFERS, 2.4),
    4: 2.2,
    5: 2.8,
    8: 1.0,
    SRGB_TRANSFER: None,
}
# The PNG specification tells encoders of sRGB to write 45455 and `SRGB`. As libpng does: a gamma
# within 5 % of 1/2.2 and chromaticities within 0.001 are these.
SRGB_EXPONENT = 2.2
GAMMA_TOLERANCE = 0.05
CHROMATICITY_TOLERANCE = 0.001

D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


class UnreadableProfileError(Exception):
    """The colours of a file are described in a way that cannot be used. The message says why."""


def profile_of(file: ImageFile) -> bytes | None:
    """Return an ICC profile of the file's colours; None if it has none or is in sRGB.

    Raises:
        UnreadableProfileError: the description is damaged.
    """
    try:
        return _profile_of(file.colour)
    except struct.error:
        raise UnreadableProfileError("it is damaged") from None


def _profile_of(colour: Mapping[str, bytes]) -> bytes | None:
    if "cICP" in colour and (space := _space(*colour["cICP"][:2])):
        return _by_space(*space)
    if "iCCP" in colour:
        return _inflated(colour["iCCP"])
    if "icc" in colour:
        return colour["icc"]
    if "nclx" in colour:
        primaries, transfer = struct.unpack_from(">HH", colour["nclx"])
        # Browsers show that of video as sRGB's in AVIF, but not in PNG.
        space = _space(primaries, SRGB_TRANSFER if transfer in VIDEO_TRANSFERS else transfer)
        return _by_space(*space) if space else None
    return None if "sRGB" in colour or "gAMA" not in colour else _by_gamma(colour)


def to_srgb(image: PIL.Image.Image, profile: bytes, grey: bool) -> PIL.Image.Image:
    """Return the image in sRGB, in mode RGB or RGBA; the image itself if nothing changes.

    Args:
        image: in mode L, RGB, RGBA or CMYK.
        profile: an ICC profile.
        grey: whether the file stores no colours, whatever the mode is.

    Raises:
        UnreadableProfileError: the profile is damaged, or describes another kind of colours.
    """
    mode = MODES.get(profile[16:20])
    if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
        raise UnreadableProfileError("it describes another kind of colours")
    transform = _transform(profile, mode)
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if mode == "L":
        shown = _by_table(image.getchannel(0), transform)
    elif mode == "RGB" and _is_identity(transform):
        return image
    else:
        shown = transform.apply(image.convert(mode))
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def matrix_profile(chromaticities: tuple[float, ...], exponent: float | None) -> bytes:
    """Return an ICC profile (version 2) of an RGB space.

    Args:
        chromaticities: x, y of white, red, green and blue.
        exponent: of the transfer function; None is that of sRGB.

    Raises:
        UnreadableProfileError: no such space exists.
    """
    try:
        columns = colorants(np.array(chromaticities, dtype=np.float64).reshape(4, 2))
        xyz = [b"XYZ \0\0\0\0" + _fixed(*column) for column in columns]
        if exponent is None:
            curve = b"para\0\0\0\0\0\3\0\0" + _fixed(*SRGB_CURVE)
        else:
            curve = b"para\0\0\0\0\0\0\0\0" + _fixed(exponent)
    except (ValueError, struct.error, np.linalg.LinAlgError):
        raise UnreadableProfileError("its chromaticities or its gamma are impossible") from None
    names = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC")
    start = HEADER_BYTES + 4 + 12 * len(names)
    tags = data = b""
    for name, tag in zip(names, [*xyz, curve, curve, curve], strict=True):
        tags += name + struct.pack(">II", start + len(data), len(tag))
        data += tag
    size, white = start + len(data), _fixed(*D50)
    kind = 0x0240_0000, b"mntrRGB XYZ ", b"acsp"
    header = struct.pack(">I4xI12s12x4s28x12s48x", size, *kind, white)
    return header + struct.pack(">I", len(names)) + tags + data


def _space(primaries: int = 2, transfer: int = 2) -> tuple[tuple[float, ...], float | None] | None:
    """Return chromaticities and exponent by two code points; None for HDR and unknown ones."""
    if primaries not in PRIMARIES or transfer not in TRANSFERS:
        return None
    return PRIMARIES[primaries], TRANSFERS[transfer]


def _by_space(chromaticities: tuple[float, ...], exponent: float | None) -> bytes | None:
    """Return the profile of a space; None for sRGB."""
    is_srgb = chromaticities == SRGB and exponent is None
    return None if is_srgb else matrix_profile(chromaticities, exponent)


def _by_gamma(colour: Mapping[str, bytes]) -> bytes | None:
    """Return the profile that a PNG's chunks gAMA and cHRM describe; None for sRGB.

    Chromaticities alone mean nothing.
    """
    (gamma,) = struct.unpack_from(">I", colour["gAMA"])
    if gamma == 0:
        return None
    chromaticities = SRGB
    if "cHRM" in colour:
        values = struct.unpack_from(">8I", colour["cHRM"])
        chromaticities = tuple(value / 100_000 for value in values)
    is_usual = abs(SRGB_EXPONENT * gamma / 100_000 - 1) <= GAMMA_TOLERANCE
    if is_usual and np.allclose(chromaticities, SRGB, rtol=0, atol=CHROMATICITY_TOLERANCE):
        return None
    return matrix_profile(chromaticities, 100_000 / gamma)


def _inflated(chunk: bytes) -> bytes:
    """Return the profile in a PNG's chunk iCCP."""
    _, _, rest = chunk.partition(b"\0")
    stream = zlib.decompressobj()
    try:
        profile = stream.decompress(rest[1:], MAX_PROFILE_BYTES + 1)
    except zlib.error:
        raise UnreadableProfileError("it is damaged") from None
    return profile


def colorants(chromaticities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return XYZ of red, green and blue, [3, 3], relative to D50, from x, y of white and of them.

    Raises ValueError if a y is 0 or a result is not finite, LinAlgError if the four are in a line.
    """
    if not (chromaticities[:, 1] > 0).all():
        raise ValueError("y is not positive")
    x, y = chromaticities.T
    white, *primaries = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    matrix = np.array(primaries).T
    matrix = matrix * np.linalg.solve(matrix, white)
    cones = (BRADFORD @ D50) / (BRADFORD @ white)
    adapted = np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ matrix
    return np.asarray(adapted.T)


def _fixed(*values: float) -> bytes:
    """Return numbers as s15Fixed16. Raises struct.error or ValueError beyond its range."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    if len(profile) > MAX_PROFILE_BYTES:
        raise UnreadableProfileError(f"it has more than {MAX_PROFILE_BYTES} bytes")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(_without_programs(profile)))
        # The destination is of version 2, because LittleCMS adds black point compensation, which
        # no browser does, if either is of version 4.
        srgb = ImageCms.ImageCmsProfile(io.BytesIO(matrix_profile(SRGB, None)))
        # Optimised curves are too coarse for dark greys.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        return ImageCms.ImageCmsTransform(source, srgb, mode, "RGB", flags=flags)
    except (OSError, ValueError, ImageCms.PyCMSError):
        raise UnreadableProfileError("it is damaged") from None


def _without_programs(profile: bytes) -> bytes:
    """Return the profile without the tags D2B0…D2B3, which take precedence over the simple ones."""
    hidden = bytearray(profile)
    count = int.from_bytes(profile[HEADER_BYTES : HEADER_BYTES + 4])
    for entry in range(min(count, 100)):
        at = HEADER_BYTES + 4 + 12 * entry
        if hidden[at : at + 3] == b"D2B":
            hidden[at : at + 4] = b"none"
    return bytes(hidden)


def _by_table(grey: PIL.Image.Image, transform: ImageCms.ImageCmsTransform) -> PIL.Image.Image:
    """Return an image of mode L in sRGB, by the 256 colours that it may have."""
    levels = PIL.Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = np.asarray(transform.apply(levels))[0, :, 0]
    # Many profiles are sRGB's, which change nothing but by rounding.
    if np.abs(table.astype(int) - np.arange(256)).max() > 1:
        grey = grey.point(table.tolist())
    return grey.convert("RGB")


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether no colour changes by more than 1 of 255: many profiles are sRGB's."""
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
    shown = np.asarray(transform.apply(PIL.Image.fromarray(colours)))
    return bool(np.abs(shown.astype(int) - colours).max() <= 1)
