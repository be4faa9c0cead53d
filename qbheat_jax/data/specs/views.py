"""Data spec of N random crops of every image, for methods that compare views."""

from dataclasses import dataclass

from qbheat_jax.data.specs.image import ImageSpec


@dataclass(frozen=True)
class ViewsSpec(ImageSpec):
    """`ImageSpec` with `views` crops of every training image: image, image2, image3, ...

    Every crop has a box and a mirroring of its own. The first is the one of `ImageSpec`, and the only one outside training.
    """

    views: int = 2

    @property
    def images(self):
        return tuple(f"image{n}" if n > 1 else "image" for n in range(1, 1 + (self.count if self.train else 1)))

    @property
    def count(self):
        """The crops of a training image."""
        return self.views
