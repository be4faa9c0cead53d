"""Decode image files to 8-bit RGB with Pillow, without tensorflow.

How pixels are converted, by Pillow's mode:

    1, L, P, RGB      8 bits or fewer, as stored
    LA, PA, RGBA      composited over white; so are pixels of a transparent colour (tRNS of a PNG, or a GIF's)
    CMYK, YCbCr, HSV  converted; CMYK of a JPEG is inverted only if the file has Adobe's marker
    I;16              0..65535, scaled by 1 / 257; a TIFF in which 0 is white is inverted
    I                 32-bit integers of a TIFF: 0..255 if no value is larger, else 0..65535; others are refused
    F                 refused: the range of floating-point pixels is unknown
"""

import functools
import io

import numpy as np
from PIL import Image, ImageChops

from qbheat_jax.data import png

# Pillow warns above this size and raises an error above twice this size. Both are bad files here.
MAX_PIXELS = 178_956_970 // 2

# Formats that Pillow decodes without another program. EPS is left out: it would start Ghostscript, which executes the file.
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
    """Raised for bytes that cannot be decoded as an image; the message is a short reason."""


def extensions():
    """Return the extensions of files that can be decoded, such as {".jpg", ".png", ...}; they depend on Pillow's build."""
    kinds = {*_formats(), "MPO"}  # MPO is a JPEG of several images
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in kinds)


def recognised(head):
    """Return whether `head`, the first bytes of a file (at most 16), begins an image; for files without an extension."""
    tests = (Image.OPEN[kind][1] for kind in _formats())
    return any(test is not None and test(head.ljust(16, b"\0")) is True for test in tests)


@functools.cache
def _formats():
    """Return the FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def decode(data, size=None):
    """Decode an image file, or the first frame of an animation, to upright RGB.

    Args:
      data: bytes of the file.
      size: (height, width) for which the image's boxes are annotated, or None. If only the stored image has this size, and
        not the image rotated by EXIF, the boxes belong to the stored image, which is then not rotated.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BadImage: the data are corrupt or truncated, have more than MAX_PIXELS, or pixels of unknown range.
    """
    image = open_header(data)
    try:
        image.load()
        # Read the tag after loading: Pillow rotates some formats by itself on loading, and drops the tag.
        turn = _TURNS.get(applied_orientation(image, size))
        rgb = to_rgb(image)
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except MemoryError:
        raise
    except BadImage:
        raise
    except Exception as error:  # Corrupt data can make Pillow's readers raise any exception.
        raise BadImage(_reason(error)) from error


def decode_numbers(data):
    """Decode an index PNG, of a palette or grey with up to 16 bits, to the numbers that it stores.

    Args:
      data: bytes of the file.

    Returns:
      int32 [H, W].

    Raises:
      BadImage: the data are no PNG, corrupt, or have several channels.
    """
    image = open_header(data)
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I", "I;16"):
        raise BadImage(f"a mask is a PNG of one channel, not a {image.format} of mode {image.mode}")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from error
    numbers, depth = np.asarray(image).astype(np.int32), data[24]
    # Pillow scales grey of 2 and 4 bits up to 255.
    return numbers * (2**depth - 1) // 255 if image.mode == "L" and depth < 8 else numbers


def open_header(data):
    """Return a PIL image of which only the header (size, mode, format) has been read. Raise `BadImage` for other bytes."""
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
    """Return the EXIF orientation, 1 to 8, of a PIL image; 1 if its EXIF block is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # The pixels may be fine although the EXIF block is broken.
        return 1
    return value if value in _TURNS else 1


def applied_orientation(image, size=None):
    """Return the EXIF orientation to apply to a PIL image, 1 (none) to 8.

    It is 1 if the boxes belong to the stored image: `size`, as in `decode`, is the stored image's size, and not the rotated
    image's. If both have that size, the boxes belong to the rotated image, which is what viewers show.
    """
    number = orientation(image)
    stored = (image.height, image.width)
    upright = stored[::-1] if number >= 5 else stored
    return 1 if size is not None and tuple(size) == stored != upright else number


def to_rgb(image):
    """Convert a loaded PIL image to mode RGB, by the table above. Raise `BadImage` for modes without a known range."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_integers(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow inverts the inks of every CMYK JPEG. Only files with Adobe's marker store them inverted, so undo it.
        image = ImageChops.invert(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image):
    """Convert a PIL image of mode I;16 or I to RGB, by the table above."""
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
