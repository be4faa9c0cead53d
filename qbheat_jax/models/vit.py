"""Vision Transformer (arXiv 2010.11929): patches, a position code, pre-norm blocks, a last layer norm."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.models.encoder import Encoder, Resized
from qbheat_jax.models.layers import LayerNorm, TransformerBlock, check_size, remat, sincos_2d


def patch_init(key, shape, dtype=jnp.float32):
    """Draw a patch kernel of shape (p, p, in, out) by Xavier uniform of its matrix [p * p * in, out], as MAE does."""
    matrix = (math.prod(shape[:3]), shape[3])
    return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)


def resample(pos_embed, old_grid, new_grid):
    """Return a learnt position code of `old_grid` = (rows, columns) resampled to `new_grid`.

    Bicubic (a = -0.5) with antialiasing and half-pixel centres, as timm's resample_abs_pos_embed.

    Args:
      pos_embed: [1, extra + rows * columns, C]; extra is 1 with a class token, whose position comes first and is kept.

    Raises:
      ValueError: the table does not fit `old_grid`.
    """
    cells, width = math.prod(old_grid), pos_embed.shape[-1]
    extra = pos_embed.shape[1] - cells
    if extra not in (0, 1):
        raise ValueError(
            f"a position code of {pos_embed.shape[1]} positions is not that of a grid {tuple(old_grid)}: that has "
            f"{cells}, or {cells + 1} with a class token"
        )
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    table = jnp.asarray(pos_embed)[:, extra:].reshape(1, *old_grid, width)
    table = jax.image.resize(table, (1, *new_grid, width), "bicubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :extra], table.reshape(1, -1, width)], axis=1)


class ViT(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / patch, W / patch, width], out).

    `out` holds maps of the features' shape: `patches`, with their position code, and `block0` ... for every block. With a
    class token it also holds `class_token` [B, width], after the last norm. H and W must be multiples of `patch`.

    Positions count from the input's own top left. QB-Heat pre-trains on crops of half the height and width, so it sees the
    codes of the first half of the rows and columns alone; whole images use the others. A learnt table gives its top left
    part to a smaller input and raises UserError for a larger one. `resize` fits it to whole images of another size.

    `keep`, int32 [B, n], encodes these cells alone, numbered by row from the top left, each with its own position.
    Features and maps are then sequences [B, n, width] in that order.

    Attributes:
      position: "sincos", fixed (layers.sincos_2d), or "learnt", a table `pos_embed` [1, extra + rows * columns, width].
      grid: (rows, columns) of a learnt table, or one number for both.
      class_token: whether a learnt token [1, 1, width] precedes the patches. A learnt table holds its position first, so
        that extra is 1; a fixed code has none for it.
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    width: int = 384
    heads: int = 6
    depth: int = 12
    patch: int = 16
    mlp_ratio: float = 4.0
    class_token: bool = False
    position: str = "sincos"
    grid: Any = ()
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    splits_heads = True
    has_batch_norm = False
    takes_keep = True

    @property
    def stride(self):
        return self.patch

    @property
    def image_size(self):
        return min(self._grid) * self.patch if self.position == "learnt" else None

    @property
    def _grid(self):
        return (self.grid, self.grid) if isinstance(self.grid, int) else tuple(self.grid)

    @nn.nowrap
    def resize(self, params, size):
        old, cells = self._grid, size // self.patch
        if self.position != "learnt" or old == (cells, cells):
            return Resized(params)
        table = resample(params["pos_embed"], old, (cells, cells))
        notice = (
            f"position code of {old[0]} x {old[1]} cells resampled to {cells} x {cells} for images of {size} pixels"
        )
        return Resized({**params, "pos_embed": table}, {"grid": cells}, notice)

    @nn.nowrap
    def layer_of(self, name):
        top = name.split("/")[0]
        if top.startswith("block"):
            return self.depth - int(top.removeprefix("block"))
        return 0 if top == "norm" else self.depth + 1

    @nn.compact
    def __call__(self, images, train=False, keep=None):
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
        token_position, position = self._position(*x.shape[1:3])
        x = x + position.astype(self.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x.reshape(x.shape[0], -1, self.width), keep[..., None], 1)
        shape, extra = x.shape, int(self.class_token)
        out = {"patches": x}
        x = x.reshape(shape[0], -1, self.width)
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
            token = jnp.broadcast_to((token + token_position).astype(self.dtype), (shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        block = remat(TransformerBlock, self.remat)
        for n in range(self.depth):
            x = block(
                self.heads,
                self.mlp_ratio,
                drop_path=self.drop_path * n / max(1, self.depth - 1),
                dtype=self.dtype,
                name=f"block{n}",
            )(x, train)
            out[f"block{n}"] = x[:, extra:].reshape(shape)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        if self.class_token:
            out["class_token"] = x[:, 0]
        return x[:, extra:].reshape(shape), out

    def _position(self, rows, columns):
        """Return (position of the class token, float32 [1, 1, width] or 0, position of the cells [rows, columns, width])."""
        if self.position == "sincos":
            return 0.0, jnp.asarray(sincos_2d(rows, columns, self.width))
        if self.position != "learnt":
            raise UserError(f"position is {self.position!r}; a ViT's position code is 'sincos' or 'learnt'")
        grid = self._grid
        if len(grid) != 2 or rows > grid[0] or columns > grid[1]:
            raise UserError(
                f"grid is {grid}; a learnt position code needs a grid (rows, columns) no smaller than the input's, "
                f"here ({rows}, {columns})"
            )
        extra = int(self.class_token)
        shape = (1, extra + math.prod(grid), self.width)
        table = self.param("pos_embed", nn.initializers.normal(0.02), shape, jnp.float32)
        cells = table[0, extra:].reshape(*grid, self.width)
        return table[:, :extra], cells[:rows, :columns]
