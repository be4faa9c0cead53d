"""MAE (arXiv 2111.06377): a ViT sees a quarter of the cells of an image, and a small decoder predicts the others."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import random

from qbheat_jax.config import FRACTION, Field
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common import decoding, masks, targets
from qbheat_jax.methods.common.encoding import encode, pooled, spread_of
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, remat, sincos_2d
from qbheat_jax.ops import images as images_lib


class MaskDecoder(nn.Module):
    """Transformer from the features of the kept cells to `outputs` numbers for every cell.

    kept [B, n, C]; ranks int32 [B, cells], each cell's place in (kept, then masked); grid (h, w); class_token [B, C] or None
    -> float32 [B, h, w, outputs]. A learnt token stands for every masked cell, and all cells get a position code.
    """

    outputs: int
    width: int = 512
    depth: int = 4
    heads: int = 8
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, kept, ranks, grid, class_token=None, train=False):
        batch, seen, _ = kept.shape
        embed = Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="embed")
        token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        token = jnp.broadcast_to(token.astype(self.dtype), (batch, ranks.shape[1] - seen, self.width))
        x = jnp.concatenate([embed(kept), token], 1)
        x = jnp.take_along_axis(x, ranks[..., None], 1)
        x = x + sincos_2d(*grid, self.width).reshape(-1, self.width).astype(self.dtype)
        if class_token is not None:
            x = jnp.concatenate([embed(class_token[:, None]), x], 1)
        block = remat(TransformerBlock, self.remat)
        for n in range(self.depth):
            x = block(self.heads, dtype=self.dtype, name=f"block{n}")(x, train)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = Dense(self.outputs, dtype=jnp.float32, kernel_init=nn.initializers.xavier_uniform(), name="pixels")(x)
        return x[:, -ranks.shape[1] :].reshape(batch, *grid, self.outputs)


@dataclasses.dataclass(frozen=True)
class MAE(base.Method):
    """Masked autoencoding.

    Args:
      encoder: ViT, the only encoder that can leave cells out.
      decoder: MaskDecoder.
      target: What each cell predicts.
      mask_ratio: Fraction of masked cells (0.75 in the paper). Every image keeps the same number, see `kept`.
      loss_on: Cells that count, "masked" or "all".
      pixels: How images are normalised.
    """

    encoder: Any
    decoder: MaskDecoder
    target: Target
    mask_ratio: float = 0.75
    loss_on: str = "masked"
    pixels: images_lib.Pixels = images_lib.Pixels()

    NAME = "mae"
    NOTE = "a vit alone"
    TITLE = "MAE"
    STORY = (
        "The encoder sees the cells of each image that a random mask leaves. A small decoder predicts the masked cells "
        "(MAE). No labels are used."
    )
    FIELDS = {
        **decoding.FIELDS,
        **targets.FIELDS,
        "mae.mask_ratio": Field(0.75, "fraction of cells that are masked", FRACTION),
    }

    @classmethod
    def check(cls, values):
        decoding.check(values)

    @classmethod
    def build(cls, config, encoder, schedule):
        if not encoder.takes_keep:
            raise UserError(
                f"config field encoder.name={config.encoder.name!r} is not accepted with objective='mae', which leaves cells "
                "out: it takes a ViT (objective='simmim' masks images for any encoder)"
            )
        ratio, cells = config.mae.mask_ratio, (config.image_size // encoder.stride) ** 2
        if not 0 < kept(cells, ratio) < cells:
            raise UserError(
                f"config field mae.mask_ratio={ratio} is not accepted: of the {cells} cells of an image of "
                f"image_size={config.image_size} it must keep and mask at least one each"
            )
        target = targets.build(config, encoder)
        decoder = MaskDecoder(sum(target.widths.values()), **decoding.options(config))
        return cls(encoder, decoder, target, ratio, config.loss_on, images_lib.PIXELS[config.pixels])

    def init(self, rng, batch):
        """Return {"params": {"encoder", "decoder"}, "batch_stats": {}}."""
        keys = random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        grid, keep, ranks = self.draw(None, images.shape)
        (features, out), encoder = self.encoder.init_with_output(keys[0], images, keep=keep)
        decoder = self.decoder.init(keys[1], features, ranks, grid, out.get("class_token"))
        return {"params": {"encoder": encoder["params"], "decoder": decoder["params"]}, "batch_stats": {}}

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean `Target.error` over the cells that count, (state, {"variance", and those of `encoding.spread_of`})).

        batch: image uint8 [B, H, W, 3], mask bool [B]. The mask is drawn by `rng`; None draws the same every time.
        `variance` is the loss of predicting the mean cell of the batch.
        """
        mask_rng, encoder_rng = (None, None) if rng is None else random.split(rng)
        images = self.pixels.normalise(batch["image"])
        grid, keep, ranks = self.draw(mask_rng, images.shape)
        features, out, state = encode(self.encoder, params, state, images, encoder_rng, train, keep=keep)
        predicted = self.decoder.apply({"params": params["decoder"]}, features, ranks, grid, out.get("class_token"))
        hidden = (ranks >= keep.shape[1]).reshape(-1, *grid)
        cells = (hidden if self.loss_on == "masked" else jnp.ones_like(hidden)) & batch["mask"][:, None, None]
        wanted = self.target(images)
        loss = masks.mean_over(self.target.error(predicted, wanted), cells)
        figures = spread_of(pooled(features, out), batch, train)
        return loss, (state, {"variance": masks.variance(self.target, wanted, cells), **figures})

    def draw(self, rng, shape):
        """Return (grid, keep, ranks) for images of a shape.

        keep int32 [B, n]: the cells that the encoder sees. ranks int32 [B, cells]: each cell's place when the kept cells, in
        the order of `keep`, come first; a cell of rank below n is seen.
        """
        grid = (shape[1] // self.encoder.stride, shape[2] // self.encoder.stride)
        ranks = masks.ranks(rng, shape[0], grid[0] * grid[1])
        order = jnp.argsort(ranks, -1).astype(jnp.int32)
        return grid, order[:, : kept(grid[0] * grid[1], self.mask_ratio)], ranks


def kept(cells, ratio):
    """Return the number of cells that the encoder sees.

    >>> kept(196, 0.75), kept(10, 0.6)
    (49, 4)
    """
    return round(cells * (1 - ratio))
