"""The part of a JPEG that a crop shows, decoded by tensorflow without the rest."""

from qbheat_jax.data import decode
from qbheat_jax.data.cpu_tensorflow import tf

# Pixels decoded around the box. libjpeg interpolates colour between its samples, one for two pixels: without the next one
# the box's edges would differ from those of the whole image.
_MARGIN = 2


def jpeg_window(data, box_of):
    """Reads the header of a JPEG -> function that decodes its box, and little more -> uint8[h, w, 3].

    `box_of(height, width) -> (top, left, height, width)`. Both give None where Pillow has to do it: for what is no upright grey
    or three-colour JPEG, and for one that does not end as a JPEG must (it is truncated, and only decoding it whole finds
    that out).
    Raises `decode.BadImage` where not even the header can be read.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    image = decode.open_header(data)
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or decode.orientation(image) != 1:
        return None
    top, left, height, width = box_of(image.height, image.width)
    above, before = min(top, _MARGIN), min(left, _MARGIN)
    window = (
        top - above,
        left - before,
        min(image.height - top, height + _MARGIN) + above,
        min(image.width - left, width + _MARGIN) + before,
    )

    def pixels():
        try:
            decoded = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        except tf.errors.OpError:
            return None
        return decoded[above : above + height, before : before + width]

    return pixels
