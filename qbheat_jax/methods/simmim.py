"""SimMIM (arXiv 2111.09886): the encoder sees the whole image with masked patches, and one linear layer predicts them.

Any encoder will do, since pixels are masked.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.config import POSITIVE, POSITIVE_FRACTION, Field
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common import masks, targets
from qbheat_jax.methods.common.encoding import encode, pooled, spread_of
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.models.layers import Dense
from qbheat_jax.ops import images as images_lib


@dataclasses.dataclass(frozen=True)
class SimMIM(base.Method):
    """Masked image modelling.

    The paper replaces masked patches by a learnt token after the patch embedding, which only some encoders have. Here every
    masked cell shows one learnt patch of pixels; behind a ViT's patch embedding that is a learnt token.

    Args:
      encoder: Module of `models.registry`.
      target: What a cell of the encoder's stride predicts.
      mask_size: Pixels a side of a patch that is masked as one (32 in the paper): a multiple of the stride that divides the
        image.
      mask_ratio: Fraction of masked patches (0.6 in the paper), see `count`.
      error: "l1", mean absolute error of plain pixels (the paper's), or "target", that of `target`.
      loss_on: Cells that count, "masked" or "all".
      pixels: How images are normalised.
    """

    encoder: Any
    target: Target
    mask_size: int = 32
    mask_ratio: float = 0.6
    error: str = "l1"
    loss_on: str = "masked"
    pixels: images_lib.Pixels = images_lib.Pixels()

    NAME = "simmim"
    TITLE = "SimMIM"
    STORY = (
        "The encoder sees whole images in which random patches are masked. A linear layer on its features predicts the "
        "masked pixels (SimMIM). No labels are used."
    )
    FIELDS = {
        **targets.FIELDS,
        "simmim.mask_ratio": Field(0.6, "fraction of patches that are masked", POSITIVE_FRACTION),
        "simmim.mask_size": Field(32, "side of a masked patch in pixels, a multiple of the stride", POSITIVE),
        "simmim.error": Field(
            "l1",
            "l1: absolute error of plain pixels (the paper's); target: the error set by norm_pix and hog",
            ("l1", "target"),
        ),
    }

    @classmethod
    def build(cls, config, encoder, schedule):
        size = config.simmim.mask_size
        if size % encoder.stride or config.image_size % size:
            raise UserError(
                f"config field simmim.mask_size={size} is not accepted: it takes a multiple of the stride of "
                f"{config.encoder.name}, {encoder.stride}, that divides image_size={config.image_size}"
            )
        fields, target, pixels = config.simmim, targets.build(config, encoder), images_lib.PIXELS[config.pixels]
        return cls(encoder, target, size, fields.mask_ratio, fields.error, config.loss_on, pixels)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "predictor", "mask"}, "batch_stats": {"encoder"}}."""
        keys = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(keys[0], images)
        features, _ = self.encoder.apply(encoder, images)
        size = self.encoder.stride
        params = {
            "encoder": encoder["params"],
            "predictor": self._predictor.init(keys[1], features)["params"],
            "mask": {"patch": jnp.zeros((size, size, 3))},
        }
        stats = {"encoder": encoder["batch_stats"]} if "batch_stats" in encoder else {}
        return {"params": params, "batch_stats": stats}

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean error over the cells that count, (state, metrics)).

        batch: image uint8 [B, H, W, 3], mask bool [B]. The mask is drawn by `rng`; None draws the same every time. metrics:
        with error "target" `variance`, the loss of predicting the mean cell of the batch; those of `encoding.spread_of`.
        """
        mask_rng, encoder_rng = (None, None) if rng is None else jax.random.split(rng)
        images = self.pixels.normalise(batch["image"])
        masked = self.masked(mask_rng, images.shape)
        features, out, state = encode(
            self.encoder, params, state, self.replaced(params, images, masked), encoder_rng, train
        )
        predicted = self._predictor.apply({"params": params["predictor"]}, features)
        figures = spread_of(pooled(features, out), batch, train)
        cells = (masked if self.loss_on == "masked" else jnp.ones_like(masked)) & batch["mask"][:, None, None]
        if self.error == "l1":
            patches = images_lib.to_patches(images, self.encoder.stride)
            return masks.mean_over(jnp.abs(predicted - patches).mean(-1), cells), (state, figures)
        wanted = self.target(images)
        loss = masks.mean_over(self.target.error(predicted, wanted), cells)
        return loss, (state, {"variance": masks.variance(self.target, wanted, cells), **figures})

    def masked(self, rng, shape):
        """Return the masked cells of images of a shape -> bool [B, H / stride, W / stride]."""
        batch, rows, columns = shape[0], shape[1] // self.mask_size, shape[2] // self.mask_size
        ranks = masks.ranks(rng, batch, rows * columns)
        patches = (ranks < count(rows * columns, self.mask_ratio)).reshape(batch, rows, columns)
        times = self.mask_size // self.encoder.stride
        return jnp.repeat(jnp.repeat(patches, times, 1), times, 2)

    def replaced(self, params, images, masked):
        """Return normalised images [B, H, W, 3] with the learnt patch in every masked cell."""
        size = self.encoder.stride
        hidden = jnp.repeat(jnp.repeat(masked, size, 1), size, 2)[..., None]
        tiled = jnp.tile(params["mask"]["patch"], (masked.shape[1], masked.shape[2], 1))
        return jnp.where(hidden, tiled, images)

    @property
    def _predictor(self):
        """Linear layer from a cell's features to its prediction, float32."""
        outputs = self.encoder.stride**2 * 3 if self.error == "l1" else sum(self.target.widths.values())
        return Dense(outputs, kernel_init=nn.initializers.xavier_uniform())


def count(patches, ratio):
    """Return the number of masked patches: the ratio's share, rounded up.

    >>> count(36, 0.6), count(10, 0.6)
    (22, 6)
    """
    return math.ceil(patches * ratio - 1e-9)  # 0.6 of 10 is 6, though the product of the floats may be a little more
