"""Vision Transformer (arXiv 2010.11929): patches, a position code, pre-norm blocks, a last layer norm.

Options make it DINOv2's, DINOv3's, CLIP's or MAE's fine-tuned one.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.models.encoder import Encoder, Resized
from qbheat_jax.models.layers import MLPS, LayerNorm, TransformerBlock, check_size, remat, rotary_2d, sincos_2d
from qbheat_jax.ops import bicubic

POSITIONS = ("sincos", "learnt", "rope")
INTERPOLATIONS = ("antialias", "bicubic")


def patch_init(key, shape, dtype=jnp.float32):
    """Draw a patch kernel of shape (p, p, in, out) by Xavier uniform of its matrix [p * p * in, out], as MAE does."""
    matrix = (math.prod(shape[:3]), shape[3])
    return nn.initializers.xavier_uniform()(key, matrix, dtype).reshape(shape)


def resample(pos_embed, old_grid, new_grid, how="antialias"):
    """Return a learnt position code of `old_grid` = (rows, columns) resampled to `new_grid`.

    Args:
      pos_embed: [1, extra + rows * columns, C]; extra is 1 with a class token, whose position comes first and is kept.
      how: one of INTERPOLATIONS. "antialias" is bicubic (a = -0.5) with antialiasing and half-pixel centres, as timm's
        resample_abs_pos_embed and DINOv2's with registers; "bicubic" is `ops.bicubic`, as DINOv2's without registers.

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
    if how == "bicubic":
        table = bicubic.resize(table[0], tuple(new_grid))
    else:
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
      position: "sincos", fixed (layers.sincos_2d), "learnt", a table `pos_embed` [1, extra + rows * columns, width], or
        "rope", rotary (layers.rotary_2d), which rotates queries and keys of the cells alone and masks the keys' bias.
      grid: (rows, columns) of a learnt table, or one number for both.
      interpolation: how `resize` fits a learnt table, see `resample`.
      class_token: whether a learnt token [1, 1, width] precedes the patches. A learnt table holds its position first, so
        that extra is 1; a fixed code has none for it.
      registers: learnt tokens [1, registers, width] between the class token and the patches, without a position
        (arXiv 2309.16588).
      mlp, mlp_ratio, layer_scale: see `TransformerBlock`.
      rope_theta: of the rotary code.
      norm_eps: of all layer norms.
      pre_norm: whether a layer norm precedes the blocks and patches have no bias, as in CLIP.
      fc_norm: whether the last norm is of the mean over the cells, `out["pooled"]` [B, width], which a classifier then
        takes. The features have no norm.
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
    interpolation: str = "antialias"
    registers: int = 0
    mlp: str = "gelu"
    layer_scale: float = 0.0
    rope_theta: float = 100.0
    norm_eps: float = 1e-6
    pre_norm: bool = False
    fc_norm: bool = False
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
        table = resample(params["pos_embed"], old, (cells, cells), self.interpolation)
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
        self._check()
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding="VALID",
            use_bias=not self.pre_norm,
            dtype=self.dtype,
            kernel_init=patch_init,
            name="patch_embed",
        )(images)
        grid = x.shape[1:3]
        token_position, position = self._position(*grid)
        if position is not None:
            x = x + position.astype(self.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x.reshape(x.shape[0], -1, self.width), keep[..., None], 1)
        shape, extra = x.shape, self.registers + self.class_token
        out = {"patches": x}
        x = x.reshape(shape[0], -1, self.width)

        def token(name, count, position=0.0):
            table = self.param(name, nn.initializers.normal(0.02), (1, count, self.width), jnp.float32)
            return jnp.broadcast_to((table + position).astype(self.dtype), (shape[0], count, self.width))

        if self.registers:
            x = jnp.concatenate([token("registers", self.registers), x], axis=1)
        if self.class_token:
            x = jnp.concatenate([token("class_token", 1, token_position), x], axis=1)
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        rope = self.position == "rope"
        inputs = (train, self._angles(grid, keep, extra)) if rope else (train,)
        block = remat(TransformerBlock, self.remat)
        for n in range(self.depth):
            x = block(
                self.heads,
                self.mlp_ratio,
                drop_path=self.drop_path * n / max(1, self.depth - 1),
                dtype=self.dtype,
                mlp=self.mlp,
                layer_scale=self.layer_scale,
                epsilon=self.norm_eps,
                key_bias=not rope,
                name=f"block{n}",
            )(x, *inputs)
            out[f"block{n}"] = x[:, extra:].reshape(shape)
        if self.fc_norm:
            out["pooled"] = norm(name="norm")(x[:, extra:].mean(1, dtype=jnp.float32))
        else:
            x = norm(name="norm")(x)
        if self.class_token:
            out["class_token"] = x[:, 0]
        return x[:, extra:].reshape(shape), out

    def _check(self):
        """Raise UserError for options outside what they take."""
        for name, value, accepted in (
            ("position", self.position, POSITIONS),
            ("mlp", self.mlp, MLPS),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in accepted:
                raise UserError(f"{name} is {value!r}; a ViT's is {', '.join(map(repr, accepted))}")
        for name in ("registers", "layer_scale"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; a ViT's is at least 0")

    def _angles(self, grid, keep, extra):
        """Return the rotary code of all tokens, 0 for the `extra` first: [N, D / 2], or [B, N, D / 2] with `keep`."""
        angles = jnp.asarray(rotary_2d(*grid, self.width // self.heads, self.rope_theta)).reshape(math.prod(grid), -1)
        angles = angles if keep is None else angles[keep]
        return jnp.pad(angles, [*[(0, 0)] * (angles.ndim - 2), (extra, 0), (0, 0)])

    def _position(self, rows, columns):
        """Return the position codes that are added: of the class token, float32 [1, 1, width] or 0, and of the cells.

        The latter is float32 [rows, columns, width], or None for a rotary code.
        """
        if self.position == "rope":
            return 0.0, None
        if self.position == "sincos":
            return 0.0, jnp.asarray(sincos_2d(rows, columns, self.width))
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
