"""Mobile-Former (arXiv 2108.05895): a convolutional map and a few global tokens, bridged in both directions.

The map is [B, H, W, C], the tokens [B, T, D]. Block lists are the release's, one row (kind, e1, c, stride, e2) for each block.
Child modules have the release's names, so weights are ported by name. The `w*` encoders are QB-Heat's; only their overall
shape is public, so their block lists are reconstructed.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.layers import (
    BatchNorm,
    ConvBN,
    DropPath,
    DyReLU,
    LayerNorm,
    attend,
    channel_shuffle,
    check_size,
    dense,
    gelu,
    hard_sigmoid,
    hard_swish,
    remat,
    residual,
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One member of the family.

    Attributes:
      blocks: rows (kind, e1, c, stride, e2); kind 1 is DnaBlock, 3 is DnaBlock3.
      width: of a last 1x1 convolution; 0 where the last block's map is the output.
      features: hidden width of the released classifier; 0 without one.
    """

    stem: int
    tokens: int
    token_dim: int
    blocks: tuple
    width: int = 0
    features: int = 0
    groups: int = 1


_26M_AND_52M = (
    (3, 3, 12, 2, 0), (1, 3, 12, 1, 3), (3, 6, 24, 2, 4), (1, 3, 24, 1, 3), (3, 6, 48, 2, 4),
    (1, 4, 48, 1, 4), (1, 6, 64, 1, 4), (3, 6, 96, 2, 4), (1, 6, 96, 1, 4),
)  # fmt: skip

VARIANTS = {
    "26m": Variant(8, 3, 128, _26M_AND_52M, features=1024, groups=4),
    "52m": Variant(8, 3, 128, _26M_AND_52M, features=1024),
    "96m": Variant(12, 4, 128, (
        (3, 2, 12, 1, 0), (3, 6, 16, 2, 4), (3, 6, 32, 2, 4), (1, 3, 32, 1, 3), (3, 6, 64, 2, 4),
        (1, 4, 64, 1, 4), (1, 6, 88, 1, 4), (3, 6, 128, 2, 4), (1, 6, 128, 1, 4),
    ), features=1280),
    "151m": Variant(12, 6, 192, (
        (3, 2, 12, 1, 0), (3, 6, 16, 2, 4), (1, 3, 16, 1, 3), (3, 6, 32, 2, 4), (1, 3, 32, 1, 3), (3, 6, 64, 2, 4),
        (1, 4, 64, 1, 4), (1, 6, 88, 1, 4), (1, 6, 88, 1, 4), (3, 6, 128, 2, 4), (1, 6, 128, 1, 4), (1, 6, 128, 1, 4),
    ), features=1280),
    "214m": Variant(12, 6, 192, (
        (3, 2, 12, 1, 0), (3, 6, 20, 2, 4), (1, 3, 20, 1, 4), (3, 6, 40, 2, 4), (1, 4, 40, 1, 4), (3, 6, 80, 2, 4),
        (1, 4, 80, 1, 4), (1, 6, 112, 1, 4), (1, 6, 112, 1, 4), (3, 6, 160, 2, 4), (1, 6, 160, 1, 4), (1, 6, 160, 1, 4),
    ), features=1600),
    "294m": Variant(16, 6, 192, (
        (3, 2, 16, 1, 0), (3, 6, 24, 2, 4), (1, 4, 24, 1, 4), (3, 6, 48, 2, 4), (1, 4, 48, 1, 4), (3, 6, 96, 2, 4),
        (1, 4, 96, 1, 4), (1, 6, 128, 1, 4), (1, 6, 128, 1, 4), (3, 6, 192, 2, 4), (1, 6, 192, 1, 4), (1, 6, 192, 1, 4),
    ), features=1920),
    "508m": Variant(24, 6, 192, (
        (3, 2, 24, 1, 0), (3, 6, 40, 2, 4), (1, 3, 40, 1, 3), (3, 6, 72, 2, 4), (1, 3, 72, 1, 3), (3, 6, 128, 2, 4),
        (1, 4, 128, 1, 4), (1, 6, 176, 1, 4), (1, 6, 176, 1, 4), (3, 6, 240, 2, 4), (1, 6, 240, 1, 4), (1, 6, 240, 1, 4),
    ), features=1920),
    "w720": Variant(16, 6, 192, (
        (3, 2, 16, 1, 0), (3, 6, 28, 2, 3), (1, 3, 28, 1, 3), (3, 6, 48, 2, 3), (1, 3, 48, 1, 3), (1, 3, 48, 1, 3),
        (3, 5, 80, 2, 4), (1, 4, 88, 1, 4), (1, 480 / 88, 88, 1, 4), (1, 6, 120, 1, 4), (1, 6, 120, 1, 4), (1, 6, 120, 1, 4),
    ), width=720),
    "w1440": Variant(32, 6, 256, (
        (3, 2, 32, 1, 0), (3, 6, 56, 2, 3), (1, 3, 56, 1, 3), (3, 6, 96, 2, 3), (1, 3, 96, 1, 3), (1, 3, 96, 1, 3),
        (3, 3, 160, 2, 4), (1, 4, 176, 1, 4), (1, 4, 176, 1, 4), (1, 6, 240, 1, 4), (1, 6, 240, 1, 4), (1, 6, 240, 1, 4),
    ), width=1440),
    "w2880": Variant(64, 6, 256, (
        (3, 2, 64, 1, 0), (3, 6, 112, 2, 3), (1, 3, 112, 1, 3), (3, 6, 192, 2, 3), (1, 3, 192, 1, 3), (1, 3, 192, 1, 3),
        (3, 6, 352, 2, 4), (1, 4, 352, 1, 4), (1, 4, 352, 1, 4), (1, 6, 480, 1, 4), (1, 6, 480, 1, 4), (1, 6, 480, 1, 4),
    ), width=2880),
    # Ours, not the paper's: stride 8, for 64-pixel images on a CPU.
    "tiny": Variant(16, 3, 64, (
        (3, 2, 24, 2, 0), (1, 3, 24, 1, 3), (3, 4, 64, 2, 2), (1, 3, 64, 1, 3), (1, 3, 64, 1, 3),
    ), width=384),
}  # fmt: skip


def _blocks(tokens, heads):
    """Return tokens [B, T, C] as [B, heads * T, C]: row h * T + t is token t in the channels of head h, zero elsewhere."""
    channels = tokens.shape[-1]
    own = jnp.repeat(jnp.eye(heads, dtype=tokens.dtype), channels // heads, axis=1)  # [heads, C]
    return (tokens[:, None] * own[:, None]).reshape(tokens.shape[0], -1, channels)


def _likeness(tokens, cells, heads):
    """Return attention logits, float32 [B, heads, T, N], of tokens [B, T, C] and cells [B, N, C], scale (C / heads) ** -0.5.

    Splitting the map into heads would transpose it. `_blocks` avoids that for `heads` times the arithmetic of a product that
    memory bounds.
    """
    logits = jnp.einsum("bkc,bnc->bkn", _blocks(tokens, heads), cells, preferred_element_type=jnp.float32)
    scale = (tokens.shape[-1] // heads) ** -0.5
    return scale * logits.reshape(tokens.shape[0], heads, tokens.shape[1], -1)


def tokens_attend(query, cells, heads):
    """Return `attend` of tokens [B, T, C] to cells [B, N, C], which are both key and value -> [B, T, C]."""
    weights = jax.nn.softmax(_likeness(query, cells, heads), axis=-1).astype(cells.dtype)
    batch, _, count, _ = weights.shape
    y = jnp.einsum("bkn,bnc->bkc", weights.reshape(batch, heads * count, -1), cells)
    y = y.reshape(batch, heads, count, heads, -1)  # of the output of head h, its own channels
    return jnp.concatenate([y[:, h, :, h] for h in range(heads)], axis=-1)


def cells_attend(cells, key, value, heads):
    """Return `attend` of cells [B, N, C] to the keys and values [B, T, C] of tokens -> [B, N, C]."""
    weights = jax.nn.softmax(_likeness(key, cells, heads), axis=2).astype(cells.dtype)
    weights = weights.reshape(weights.shape[0], heads * key.shape[1], -1)
    return jnp.einsum("bkn,bkc->bnc", weights, _blocks(value, heads))


class LocalGlobal(nn.Module):
    """Bridge from the map to the tokens: two-head cross-attention without key or value projection, post-norm.

    x [B, H, W, C], tokens [B, T, D] -> tokens [B, T, D].
    """

    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tokens, train):
        channels, token_dim = x.shape[-1], tokens.shape[-1]
        cells = x.reshape(x.shape[0], -1, channels)
        y = tokens_attend(dense(channels, self.dtype, "q")(tokens), cells, heads=2)
        alpha = 2.0 * hard_sigmoid(dense(channels, self.dtype, "alpha")(tokens))  # a gain per token and channel
        y = dense(token_dim, self.dtype, "proj")(y * alpha)
        tokens = residual(tokens, DropPath(self.drop_path)(y, train))
        return LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm")(tokens)


class GlobalBlock(nn.Module):
    """Transformer block over the tokens: four heads, only the query projected, post-norm. [B, T, D] -> [B, T, D]."""

    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, train):
        width = tokens.shape[-1]
        y = attend(dense(width, self.dtype, "q")(tokens), tokens, tokens, heads=4)
        tokens = residual(tokens, DropPath(self.drop_path)(dense(width, self.dtype, "channel_mlp")(y), train))
        tokens = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="layer_norm")(tokens)
        y = gelu(dense(2 * width, self.dtype, "ffn0")(tokens))
        tokens = residual(tokens, DropPath(self.drop_path)(dense(width, self.dtype, "ffn2")(y), train))
        return LayerNorm(epsilon=1e-5, dtype=self.dtype, name="ffn_norm")(tokens)


class GlobalLocal(nn.Module):
    """Bridge from the tokens to the map: two-head cross-attention, the map itself the query.

    x [B, H, W, C], tokens [B, T, D] -> [B, H, W, C].
    """

    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tokens, train):
        channels = x.shape[-1]
        key, value = dense(channels, self.dtype, "k")(tokens), dense(channels, self.dtype, "proj")(tokens)
        y = cells_attend(x.reshape(x.shape[0], -1, channels), key, value, heads=2)
        return x + DropPath(self.drop_path)(y.reshape(x.shape), train)


class Block(nn.Module):
    """One row of a block list: (x [B, H, W, C], tokens) -> (x [B, H / stride, W / stride, c], tokens)."""

    kind: int
    e1: float
    channels: int
    stride: int
    e2: float
    groups: int = 1
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, tokens, train):
        if self.e1 == 1 or self.e2 == 0:
            return self._conv_alone(x, train), tokens
        tokens = LocalGlobal(self.drop_path, self.dtype, name="local_global")(x, tokens, train)
        tokens = GlobalBlock(self.drop_path, self.dtype, name="global_block")(tokens, train)
        y = (self._dna_block if self.kind == 1 else self._dna_block3)(x, tokens[:, 0], train)
        if self.kind == 1:
            y = self._shortcut(x, y, train)
        y = GlobalLocal(self.drop_path, self.dtype, name="global_local")(y, tokens, train)
        if self.kind == 3 and self.stride == 1 and x.shape[-1] == self.channels:
            y = y + x
        return y, tokens

    def _shortcut(self, x, y, train):
        if self.stride == 1 and x.shape[-1] == self.channels:
            return x + DropPath(self.drop_path)(y, train)
        return y

    def _conv(self, x, features, kernel, stride, groups, train, name):
        return ConvBN(features, kernel, stride, groups, self.dtype, name=name)(x, train)

    def _shuffle(self, x, groups):
        return channel_shuffle(x, groups) if self.groups > 1 else x

    def _conv_alone(self, x, train):
        channels = x.shape[-1]
        y = self._conv(x, round(channels * self.e1), 3, self.stride, channels, train, "depthwise")
        y = self._shuffle(jax.nn.relu6(y), channels)
        y = self._conv(y, self.channels, 1, 1, self.groups, train, "pointwise")
        return x + y if self.stride == 1 and channels == self.channels else y

    def _dna_block(self, x, token, train):
        hidden = round(x.shape[-1] * self.e1)
        y = self._shuffle(self._conv(x, hidden, 1, 1, self.groups, train, "conv1"), self.groups)
        y = DyReLU(self.dtype, name="hyper1")(y, token)
        y = self._conv(y, hidden, 3, self.stride, hidden, train, "conv2")
        y = DyReLU(self.dtype, name="hyper2")(y, token)
        return self._shuffle(self._conv(y, self.channels, 1, 1, self.groups, train, "conv3"), self.groups)

    def _dna_block3(self, x, token, train):
        channels, out = x.shape[-1], self.channels
        y = self._conv(x, round(channels * self.e1), 3, self.stride, channels, train, "conv1")
        y = DyReLU(self.dtype, name="hyper1")(self._shuffle(y, channels), token)
        y = u = self._conv(y, out, 1, 1, self.groups, train, "conv2")
        y = self._conv(y, round(out * self.e2), 3, 1, out, train, "conv3")
        y = DyReLU(self.dtype, name="hyper3")(self._shuffle(y, out), token)
        y = self._conv(y, out, 1, 1, self.groups, train, "conv4")
        return u + DropPath(self.drop_path)(y, train)


class MobileFormer(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, width], out).

    `out` holds `stem`, `features_N` and `tokens_N` for every block, and `tokens` [B, T, D] after the last bridge. H and W must
    be multiples of `stride`.

    Attributes:
      last_stride: of the last block that strides, 2 or 1; the weights are the same.
      drop_path: rate of every block, as in the release.
      remat: policy of the blocks, see layers.remat.
    """

    variant: Variant
    last_stride: int = 2
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"

    @property
    def stride(self):
        return math.prod((2, *(row[3] for row in self._blocks())))

    @property
    def width(self):
        return self.variant.width or self.variant.blocks[-1][2]

    @nn.nowrap
    def layer_of(self, name):
        top, count = name.split("/")[0], len(self.variant.blocks)
        if top.startswith("features_"):
            return count - int(top.removeprefix("features_"))
        return count + 1 if top in ("stem", "tokens") else 0

    @nn.compact
    def __call__(self, images, train=False):
        v, out = self.variant, {}
        check_size(images, self.stride)
        tokens = self.param("tokens", nn.initializers.normal(1.0), (v.tokens, v.token_dim), jnp.float32)
        tokens = jnp.broadcast_to(tokens.astype(self.dtype), (images.shape[0], *tokens.shape))
        x = jax.nn.relu6(ConvBN(v.stem, 3, 2, 1, self.dtype, name="stem")(images, train))
        out["stem"] = x
        dna = remat(Block, self.remat, inputs=2)
        for n, row in enumerate(self._blocks()):
            block = dna(*row, groups=v.groups, drop_path=self.drop_path, dtype=self.dtype, name=f"features_{n}")
            x, tokens = block(x, tokens, train)
            out[f"features_{n}"], out[f"tokens_{n}"] = x, tokens
        out["tokens"] = LocalGlobal(self.drop_path, self.dtype, name="local_global")(x, tokens, train)
        if v.width:
            x = jax.nn.relu(ConvBN(v.width, 1, 1, 1, self.dtype, name="last")(x, train))
        return x, out

    def _blocks(self):
        """Return the rows of the block list, with `last_stride`."""
        rows = self.variant.blocks
        last = max((n for n, row in enumerate(rows) if row[3] > 1), default=-1)
        return [(*row[:3], self.last_stride, row[4]) if n == last else row for n, row in enumerate(rows)]


class MobileFormerHead(nn.Module):
    """The released classifier: features [B, H, W, C] and out["tokens"] [B, T, D] -> logits float32 [B, classes]."""

    classes: int
    features: int
    groups: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, out, train=False):
        x = channel_shuffle(features, self.groups) if self.groups > 1 else features
        x = jax.nn.relu6(ConvBN(6 * x.shape[-1], 1, 1, self.groups, self.dtype, name="conv")(x, train))
        x = jnp.concatenate([hard_swish(x.mean((1, 2))), out["tokens"][:, 0]], -1)
        x = dense(self.features, self.dtype, "fc")(x)
        x = hard_swish(BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn")(x))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return dense(self.classes, jnp.float32, "classifier")(x)
