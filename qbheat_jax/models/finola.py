"""FINOLA's decoder (arXiv 2305.16319): features are pooled to vectors, which grow into a map that convolutions decode."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.kernels import conv
from qbheat_jax.models.layers import Dense, LayerNorm, gelu, sincos_2d
from qbheat_jax.ops import autoregression
from qbheat_jax.ops import heat as heat_lib

# The fewest channels of the decoder's convolutions.
_NARROWEST = 16


class AttentionPool(nn.Module):
    """Features [B, h, w, C] -> float32 [B, paths, width]: one learnt query a path attends to all cells.

    Each of `heads` attends by itself. Keys and values get a sine-cosine position code.
    """

    paths: int
    width: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features):
        batch, height, width, _ = features.shape

        def dense(name, dtype=self.dtype, bias=True):
            return Dense(self.width, bias, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)

        x = dense("embed")(features)
        x = x + sincos_2d(height, width, self.width).astype(x.dtype)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        query = self.param("query", nn.initializers.normal(1.0), (self.paths, self.width), jnp.float32)
        query = query.reshape(self.paths, self.heads, -1).astype(self.dtype)
        # A bias of the keys would add the same to all logits of a head.
        key, value = dense("key", bias=False)(x), dense("value")(x)
        key, value = (y.reshape(batch, height * width, self.heads, -1) for y in (key, value))
        logits = jnp.einsum("phd,bnhd->bhpn", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(key.shape[-1])).astype(self.dtype)
        pooled = jnp.einsum("bhpn,bnhd->bphd", weights, value).reshape(batch, self.paths, self.width)
        return dense("vectors", jnp.float32)(pooled.astype(jnp.float32))


class _Conv(nn.Module):
    """A 3 x 3 convolution with a bias, [B, H, W, C] -> [B, H, W, features]; its outputs keep the scale of its inputs."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return conv(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class ConvDecoder(nn.Module):
    """Map float32 [B, h, w, C] -> pixels float32 [B, stride * h, stride * w, 3].

    Each doubling of the size is a convolution and a nearest-neighbour upsampling; it halves the channels. Three convolutions
    follow at the size of the image. All are 3 x 3. At stride 1 these three are the whole decoder.
    """

    stride: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z):
        def layer(x, width, name):
            return _Conv(width, self.dtype, name=name)(x)

        doublings = self.stride.bit_length() - 1
        widths = [max(self.width >> n, min(self.width, _NARROWEST)) for n in range(doublings + 1)]
        x = z
        for n, width in enumerate(widths[:-1]):
            x = gelu(layer(x, width, f"up{n}"))
            x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        for n in range(2):
            x = gelu(layer(x, widths[-1], f"conv{n}"))
        return layer(x, 3, "pixels").astype(jnp.float32)


class FinolaDecoder(nn.Module):
    """Features [B, h, w, C] -> (pixels float32 [B, *size, 3], {"vectors": [B, paths, width], "map": [B, H', W', width]}).

    The map has one cell for every `stride` x `stride` pixels. Each path's vector grows from the centre by the same A and B;
    the map is the sum over the paths. Parameters: `heat`, those of A and B per half map (see ops/heat.py), and the layers.
    """

    size: tuple
    stride: int
    width: int
    paths: int
    heads: int
    channels: int
    init_scale: float
    dtype: Any = jnp.float32

    @property
    def heat(self):
        """The choices of A and B."""
        return heat_lib.Heat("autoregressive", norm="layer", init_scale=self.init_scale)

    @nn.compact
    def __call__(self, features):
        params = self.param("heat", heat_lib.init, self.width, self.heat)
        vectors = AttentionPool(self.paths, self.width, self.heads, self.dtype, name="pool")(features)
        height, width = (side // self.stride for side in self.size)
        halves = {"x": width / 2, "y": height / 2}
        steps = {name: matrix / halves[name[0]] for name, matrix in params.items()}
        batch = vectors.shape[0]
        grown = autoregression.from_centre(
            steps, vectors.reshape(batch * self.paths, self.width), height, width, dtype=self.dtype
        )
        grid = grown.reshape(batch, self.paths, height, width, self.width).sum(1)
        pixels = ConvDecoder(self.stride, self.channels, self.dtype, name="pixels")(grid)
        return pixels, {"vectors": vectors, "map": grid}
