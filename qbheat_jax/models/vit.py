"""Vision Transformer (arXiv 2010.11929): patches, a position code, pre-norm blocks, a last layer norm."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qbheat_jax.models.layers import TransformerBlock, check_size, sincos_2d


def patch_init(key, shape, dtype=jnp.float32):
    """Xavier uniform of the patch kernel taken as the matrix it is, as MAE does; shape (p, p, in, out)."""
    matrix = (math.prod(shape[:3]), shape[3])
    return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)


class ViT(nn.Module):
    """The encoder. images [B, H, W, 3] -> (features [B, H / patch, W / patch, width], out).

    H and W are multiples of `patch`, otherwise ValueError. `out` holds, as maps of the features' shape, `patches` (with
    their position code) and `block0` ... of every block, and with a class token `class_token` [B, width], after the
    last norm.

    `position`: "sincos", fixed (layers.sincos_2d), or "learnt", a table of `grid` = (rows, columns) cells. Both go by
    row and column counted from the input's own top left. In QB-Heat's pre-training the input is a crop of half the
    height and width, so that only the codes of the first half of the rows and columns are seen, whatever the placement;
    the others come in with whole images. A learnt table gives its top left part to a smaller input and refuses a larger
    one with ValueError.
    `class_token`: a learnt token before the patches, without a position code of its own (a released one is added to the
    token, which is the same function). `drop_path`: the rate of the last block; it grows linearly from 0 at the first.
    """

    width: int = 384
    heads: int = 6
    depth: int = 12
    patch: int = 16
    mlp_ratio: float = 4.0
    class_token: bool = False
    position: str = "sincos"
    grid: tuple = ()
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @property
    def stride(self):
        return self.patch

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.patch)
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=patch_init,
            name="patch_embed",
        )(images)
        x = x + self._position(*x.shape[1:3]).astype(self.dtype)
        shape = x.shape
        out = {"patches": x}
        x = x.reshape(shape[0], -1, self.width)
        extra = int(self.class_token)
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        for n in range(self.depth):
            x = TransformerBlock(
                self.heads,
                self.mlp_ratio,
                drop_path=self.drop_path * n / max(1, self.depth - 1),
                dtype=self.dtype,
                name=f"block{n}",
            )(x, train)
            out[f"block{n}"] = x[:, extra:].reshape(shape)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        if self.class_token:
            out["class_token"] = x[:, 0]
        return x[:, extra:].reshape(shape), out

    def _position(self, rows, columns):
        """float32 [rows, columns, width]."""
        if self.position == "sincos":
            return jnp.asarray(sincos_2d(rows, columns, self.width))
        if self.position != "learnt":
            raise ValueError(f"position is {self.position!r}; a ViT's position code is 'sincos' or 'learnt'")
        if len(self.grid) != 2 or rows > self.grid[0] or columns > self.grid[1]:
            raise ValueError(
                f"grid is {self.grid}; a learnt position code needs a grid (rows, columns) no smaller than the "
                f"input's, here ({rows}, {columns})"
            )
        table = self.param("position_code", nn.initializers.normal(0.02), (*self.grid, self.width), jnp.float32)
        return table[:rows, :columns]
