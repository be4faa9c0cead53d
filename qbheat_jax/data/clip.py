"""A clip that has not been read yet: paired RGB and event frames, and its label."""

import dataclasses
from collections.abc import Callable, Sequence

from qbheat_jax.data import decode
from qbheat_jax.data.specs import image

# Order of the modalities along a batch's second axis.
MODALITIES = ("RGB", "event")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One example of a source of clips.

    Attributes:
      count: number of frames of each modality.
      label: int, -1 for none.
      name: name for messages.
      read: function of frame numbers, 0 to count - 1, that returns [(RGB, event), ...], each encoded bytes or uint8
        [H, W, 3 or 1]. It raises OSError or `decode.BadImage`.
    """

    count: int
    label: int
    name: str
    read: Callable[[Sequence[int]], list]

    def decode(self, numbers):
        """Return frames [(RGB, event), ...], uint8 [H, W, 3] each and all of one size.

        Raises:
          decode.BadImage: a frame cannot be read or decoded, or has another size. Errors of reading become this one, so
            that `BadFiles` counts the clip and not each of its files.
        """
        try:
            read = self.read(numbers)
        except OSError as error:
            raise decode.BadImage(f"{error.filename or 'a frame'}: {error.strerror or error}") from error
        frames, sizes = [], {}
        for number, pair in zip(numbers, read):
            pixels = []
            for modality, content in zip(MODALITIES, pair):
                try:
                    pixels.append(image.pixels(content))
                except decode.BadImage as error:
                    raise decode.BadImage(f"{modality} frame {number}: {error}") from error
                sizes.setdefault(pixels[-1].shape[:2], f"{modality} frame {number}")
            frames.append(tuple(pixels))
        if len(sizes) > 1:
            named = (f"{name} has {width} x {height}" for (height, width), name in sizes.items())
            raise decode.BadImage(f"frames of different sizes: {', '.join(named)} pixels")
        return frames
