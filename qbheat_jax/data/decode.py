"""Encoded bytes -> correct 8-bit RGB by Pillow. No tensorflow.

What each kind of pixel means, by Pillow's mode:

    1, L, P, RGB      8 bits or fewer, as stored
    LA, PA, RGBA      composited over white, as is the colour that a PNG's or GIF's tRNS makes transparent
    CMYK, YCbCr, HSV  converted; inks of a JPEG without Adobe's marker are not inverted
    I;16              0..65535, scaled by 1 / 257; a TIFF in which 0 is white is inverted
    I                 32-bit integers of a TIFF: 0..255 where none is larger, else 0..65535; others are refused
    F                 refused: the range of floating-point pixels is unknown
"""

import functools
import io

import numpy as np
from PIL import Image, ImageChops

from qbheat_jax.data import png

# Pillow's own limit is a warning here and an error at twice this size; both are bad files for us.
MAX_PIXELS = 178_956_970 // 2

# Formats of pictures that Pillow decodes by itself. EPS is none of them: it would start Ghostscript, which runs programs.
FORMATS = tuple("JPEG PNG WEBP GIF BMP TIFF AVIF JPEG2000 DIB PCX PPM PSD QOI SGI SUN TGA".split())

_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0
_BITS_TAG = 258
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """These bytes are not an image that can be decoded; the message is a short reason."""


def extensions():
    """Return the endings of the files that are read, such as {".jpg", ".png", ...}; the wheel of Pillow decides."""
    kinds = {*_formats(), "MPO"}  # which is a JPEG of several images
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in kinds)


def recognised(head):
    """Return whether a file that begins with these bytes, at most 16, is an image, for files without an ending."""
    tests = (Image.OPEN[kind][1] for kind in _formats())
    return any(test is not None and test(head.ljust(16, b"\0")) is True for test in tests)


@functools.cache
def _formats():
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def decode(data, size=None):
    """Bytes of an image file (of an animation, the first frame) -> uint8[H, W, 3], upright RGB.

    Args:
      data: bytes.
      size: (height, width) that the image's boxes are annotated for. Where only the image as it is stored has this size, and
        not the image as EXIF turns it, boxes are of the stored one, and it is not turned.

    Raises:
      BadImage: the data are corrupt, truncated, larger than MAX_PIXELS, or of pixels without a known range.
    """
    image = open_header(data)
    try:
        image.load()
        # After loading: Pillow turns some formats upright by itself then, and drops the tag.
        turn = _TURNS.get(turned(image, size))
        rgb = to_rgb(image)
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except MemoryError:
        raise
    except BadImage:
        raise
    except Exception as error:  # Corrupt data makes Pillow's readers fail in every way that Python has.
        raise BadImage(_reason(error)) from error


def open_header(data):
    """Bytes -> PIL.Image.Image whose header only has been read (size, mode, format). Raises `BadImage`."""
    if not data:
        raise BadImage("the file is empty")
    data = png.without_metadata(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image in a known format") from error
    except Exception as error:
        raise BadImage(_reason(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} accepted")
    if image.format == "PNG":
        png.scale_transparency(image, data)
    return image


def orientation(image):
    """EXIF orientation 1..8 of a PIL image; 1 where there is none or where its EXIF block is broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A broken EXIF block says nothing about the pixels.
        return 1
    return value if value in _TURNS else 1


def turned(image, size=None):
    """Return the EXIF orientation by which an image is turned: 1 where its boxes are of the image as stored.

    `size`: as of `decode`. Where the image has that size both ways, its boxes are of the upright one, as viewers show it.
    """
    number = orientation(image)
    stored = (image.height, image.width)
    upright = stored[::-1] if number >= 5 else stored
    return 1 if size is not None and tuple(size) == stored != upright else number


def to_rgb(image):
    """Loaded PIL image of any mode with a known range -> PIL image of mode RGB. Raises `BadImage` for the others."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_integers(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's, which stores inks inverted; without Adobe's marker they are not.
        image = ImageChops.invert(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image):
    """Modes I;16 and I -> RGB: see the table above."""
    values, most = np.asarray(image).astype(np.int64), 65535
    if values.size and (values.min() < 0 or values.max() > most):
        raise BadImage("32-bit pixels, whose range is unknown")
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and max(tags.get(_BITS_TAG, (16,))) > 16 and values.max(initial=0) < 256:
        most = 255
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        values = most - values
    if isinstance(image.info.get("transparency"), int):
        values = np.where(values == image.info["transparency"], most, values)
    small = values if most == 255 else (values + 128) // 257
    return Image.fromarray(small.astype(np.uint8)).convert("RGB")


def _reason(error):
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
