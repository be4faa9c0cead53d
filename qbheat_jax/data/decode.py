"""Encoded bytes -> correct 8-bit RGB by Pillow: grey, palette, transparency, CMYK, 16 bits, EXIF. No tensorflow."""

import io

import numpy as np
from PIL import Image, ImageChops

# Pillow's own limit is a warning here and an error at twice this size; both are bad files for us.
MAX_PIXELS = 178_956_970 // 2

_ORIENTATION_TAG = 0x0112
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


def decode(data):
    """Bytes of an image file (of an animation, the first frame) -> uint8[H, W, 3], upright RGB.

    Transparency is composited over white, 16-bit values are scaled by 1 / 257. Raises `BadImage` where the data
    is corrupt, truncated, larger than `MAX_PIXELS`, or of pixels without a known range (floats).
    """
    image = open_header(data)
    try:
        image.load()
        # After loading: Pillow turns some formats upright by itself then, and drops the tag.
        turn = _TURNS.get(orientation(image))
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
    try:
        image = Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image in a known format") from error
    except Exception as error:
        raise BadImage(_reason(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} accepted")
    return image


def orientation(image):
    """EXIF orientation 1..8 of a PIL image; 1 where there is none or where its EXIF block is broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A broken EXIF block says nothing about the pixels.
        return 1
    return value if value in _TURNS else 1


def to_rgb(image):
    """Loaded PIL image of any mode with a known range -> PIL image of mode RGB. Raises `BadImage` for the others."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bits(image)
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


def _from_16_bits(image):
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BadImage("32-bit pixels, whose range is unknown")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(error):
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
