"""Classifiers: linear on pooled features or on an encoder's outputs, or after transformer blocks."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qbheat_jax.models.encoder import pooled
from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, sincos_2d


class LinearHead(nn.Module):
    """Features [..., C] -> logits float32 [..., classes], of pooled features (`lin`) or of every cell (`seg-lin`)."""

    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="classifier")(x)


class PooledHead(nn.Module):
    """The classifier of most releases: an encoder's (features [B, h, w, C], out) -> logits float32 [B, classes].

    A linear map, after dropout, of `encoder.pooled`. `std` is the standard deviation of its initial weights.
    """

    classes: int
    dropout: float = 0.0
    std: float = 0.01

    @nn.compact
    def __call__(self, features, out, train=False):
        x = nn.Dropout(self.dropout)(pooled(features, out), deterministic=not train)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(self.std), name="classifier")(x)


class BlockHead(nn.Module):
    """Feature map [B, h, w, C] -> transformer blocks over its cells -> mean -> logits float32 [B, classes] (`tran-N`).

    width 0 keeps the map's channels; otherwise a linear map to `width` comes first. A sine-cosine position code is added.
    """

    classes: int
    blocks: int = 1
    width: int = 0
    heads: int = 8
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        batch, height, width, channels = x.shape
        if self.width:
            channels = self.width
            x = Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="embed")(x)
        x = x + sincos_2d(height, width, channels).astype(x.dtype)
        x = x.reshape(batch, height * width, channels)
        for n in range(self.blocks):
            block = TransformerBlock(
                self.heads, dropout=self.dropout, drop_path=self.drop_path, dtype=self.dtype, name=f"block{n}"
            )
            x = block(x, train)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x).mean(1)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="classifier")(
            x.astype(jnp.float32)
        )
