"""Data spec of multi-crop: two views of every image and small crops of another size (SwAV, arXiv 2006.09882; DINO)."""

from dataclasses import dataclass

from qbheat_jax.config import FRACTION_RANGE, Field, at_least, refuse
from qbheat_jax.data.specs.views import ViewsSpec

FIELDS = {
    "data.local_crops": Field(
        8,
        "small crops of every image besides its two views; 0: none",
        (lambda v: 0 <= v <= 90, "a number from 0 to 90"),
    ),
    "data.local_size": Field(
        0, "pixels a side of a small crop; 0: a multiple of 32 near 3/7 of image_size, such as 96 of 224", at_least(0)
    ),
    "data.local_scale": Field((0.05, 0.4), "share of the image's area that a small crop keeps", FRACTION_RANGE),
}


def check(values):
    """Raise UserError where small crops are larger than the images."""
    size, local = values["image_size"], values["data.local_size"]
    if values["data.local_crops"] and local > size:
        refuse("data.local_size", local, f"a number that is at most image_size={size}")


def local_size(config):
    """Return the pixels a side of a config's small crops.

    >>> from ml_collections import ConfigDict
    >>> [local_size(ConfigDict({"image_size": side, "data": {"local_size": 0}})) for side in (32, 64, 128, 224, 256)]
    [32, 32, 64, 96, 96]
    """
    size = config.image_size
    return config.data.local_size or min(size, max(32, 32 * round(size * 3 / 7 / 32)))


@dataclass(frozen=True)
class CropsSpec(ViewsSpec):
    """`ViewsSpec` with `local_crops` further crops of `local_size` pixels, a share `local_scale` of the image's area.

    A training batch has image, image2 uint8 [B, S, S, 3], the views, then image3, image4, ... uint8 [B, L, L, 3].
    """

    local_crops: int = 0
    local_size: int = 96
    local_scale: tuple = (0.05, 0.4)

    @classmethod
    def of(cls, config, placements=(0,), **fields):
        """Return the spec of a training config with the fields of this module."""
        given = config.data
        local = {"local_crops": given.local_crops, "local_size": local_size(config)}
        return super().of(config, placements, **local, local_scale=tuple(given.local_scale), **fields)

    @property
    def count(self):
        return self.views + self.local_crops

    def crop_of(self, view):
        return super().crop_of(view) if view < self.views else (self.local_size, self.local_scale)
