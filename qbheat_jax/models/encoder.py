"""Base class of encoders: the interface that the rest of the package uses."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp


class Resized(NamedTuple):
    """The parameters of an encoder for another image size.

    Args:
      params: the encoder's parameters.
      options: {encoder option: new value} of the module that takes them.
      notice: one line for the log on what changed; empty if nothing did.
    """

    params: Any
    options: dict = {}
    notice: str = ""


def pooled(features, out):
    """Return one vector an image, float32 [B, C]: `pooled` or else the class token of `out`, or the mean over the cells.

    features: [B, h, w, C], or [B, n, C] of some of the cells.
    """
    for name in ("pooled", "class_token"):
        if name in out:
            return out[name].astype(jnp.float32)
    return features.astype(jnp.float32).mean(tuple(range(1, features.ndim - 1)))


class Encoder(nn.Module):
    """Base class of encoders.

    An encoder maps images [B, H, W, 3] to (features [B, H / stride, W / stride, width], out), where `out` holds its
    intermediates by name. `out["pooled"]` [B, width], where it is, is what a classifier takes. One that takes clips maps
    [B, 2, T, H, W, 3], with the axes (RGB, event) and time, instead. A subclass defines `stride`, `width`, `drop_path` and
    `dtype`, and overrides what differs below.

    Attributes:
      splits_heads: whether attention heads are split over the mesh axis `model`.
      has_batch_norm: whether training updates batch statistics.
      takes_clips: whether it takes clips, see `data.specs.clips.ClipsSpec`, instead of images.
      own: regular expression of the names of parameters that it has besides those that it may `adopt`.
      takes_keep: whether `__call__` takes `keep`, int32 [B, n], and encodes these cells alone.
      fold: method of (params, size) that returns a `Resized` for inference on square images of `size` pixels, with what
        depends on parameters alone computed. None where the encoder has no such form.
      layer_of: method of a parameter's name (`block0/fc1/kernel`) that returns the number of layers between it and the
        head: 0 after the last block, 1 in the last block, the number of blocks + 1 before the first. None where the
        encoder defines no order; layer-wise learning-rate decay is then refused.
    """

    splits_heads = False
    has_batch_norm = True
    takes_clips = False
    takes_keep = False
    own = ""
    fold = None
    layer_of = None

    @property
    def image_size(self):
        """The side in pixels of the images that the parameters are made for; None where none depends on it."""
        return None

    @property
    def one_size(self):
        """Whether it takes images of `image_size` alone, and no quarters of them."""
        return self.image_size is not None

    @property
    def least_size(self):
        """The side in pixels of the smallest images that it takes."""
        return self.stride

    @nn.nowrap
    def for_images(self, size):
        """Return the encoder with parameters for images of `size` pixels a side, where its options leave that open."""
        del size
        return self

    @nn.nowrap
    def resize(self, params, size):
        """Return a `Resized` for square images of `size` pixels. Encoders without size-dependent parameters keep theirs."""
        del size
        return Resized(params)

    @nn.nowrap
    def adopt(self, other, params):
        """Return those of another encoder's parameters that this one begins with, by its own names; None if it cannot."""
        del other, params
        return None

    @nn.nowrap
    def example_shape(self, side, frames=1):
        """Return the shape of one example with images of `side` pixels: (side, side, 3), or that of a clip of `frames`."""
        del frames
        return (side, side, 3)

    @nn.nowrap
    def picture(self, images):
        """Return what a decoder of the features predicts, [B, H, W, picture_channels]: the images themselves.

        It keeps the type, uint8 or float32.
        """
        return images

    @property
    def picture_channels(self):
        """The channels of `picture`."""
        return 3
