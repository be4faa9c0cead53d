"""The heat decoder: extrapolate visible features over the grid, refine them, and predict the pixels of each cell."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, remat, sincos_2d
from qbheat_jax.ops import heat as heat_lib


class HeatDecoder(nn.Module):
    """Predict `outputs` numbers for every cell of the image from its visible features.

    visible [B, h/2, w/2, C], quarter int32 [B] -> (float32 [B, h, w, outputs], {"grid": extrapolated float32 [B, h, w, C]}).

    The paper states "a small decoder"; width, depth and heads are this project's choice. depth 0 is a linear decoder from the
    grid to the pixels. Parameters: `heat`, those of the operator (see ops/heat.py), and the layers.
    """

    outputs: int
    heat: heat_lib.Heat = heat_lib.Heat()
    placements: tuple = tuple(range(9))
    width: int = 512
    depth: int = 4
    heads: int = 8
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, visible, quarter, train=False):
        params = self.param("heat", heat_lib.init, visible.shape[-1], self.heat)
        grid = heat_lib.extrapolate(params, self.heat, visible, quarter, self.placements)
        batch, height, width, _ = grid.shape
        x = Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="embed")(grid)
        x = x + sincos_2d(height, width, self.width).astype(self.dtype)
        x = x.reshape(batch, height * width, self.width)
        block = remat(TransformerBlock, self.remat)
        for n in range(self.depth):
            x = block(self.heads, dtype=self.dtype, name=f"block{n}")(x, train)
        if self.depth:  # a norm would not be linear
            x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = Dense(
            self.outputs,
            dtype=jnp.float32,
            kernel_init=nn.initializers.xavier_uniform(),
            name="pixels",
        )(x)
        return x.reshape(batch, height, width, -1), {"grid": grid}
