"""vHeat (arXiv 2405.16555): maps mixed by heat conduction, with a learnt diffusivity for every frequency and channel.

A stage has one table of frequency embeddings. Each of its blocks maps the table to its own diffusivities, which depend on no
image. `ops.heat_conduction` has the operator.

Child modules have the release's names, each dot before a digit as an underscore, so weights are ported by name.
`layers_I_J` is block J of stage I, and at J = the stage's depth the downsampling after it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.models.conv_stem import ConvStem, Downsampling
from qbheat_jax.models.encoder import Encoder, Resized
from qbheat_jax.models.layers import (
    Conv,
    Dense,
    DropPath,
    LayerNorm,
    check_size,
    drop_path_rates,
    gelu,
    remat,
    residual,
)
from qbheat_jax.ops import bicubic
from qbheat_jax.ops.heat_conduction import decay, heat_conduction

# Image size of the released weights, in pixels.
_RELEASED = 224
_normal = nn.initializers.normal(0.02)
NORM, STEM_NORM = (functools.partial(LayerNorm, epsilon=epsilon) for epsilon in (1e-5, 1e-6))


class Heat2D(nn.Module):
    """Heat conduction of a projection of the map, then a gate: x [B, H, W, C] -> [B, H, W, C].

    It falls into three steps, which other encoders call one by one: `source`, `heat_conduction` by the factors of `decay`,
    and `finish`.

    Attributes:
      channels: C.
      folded: (rows, columns) of the parameter `k_exp`, the decay factors that replace `to_k` at inference; () in training.
    """

    channels: int
    folded: tuple = ()
    dtype: Any = jnp.float32

    def setup(self):
        channels, dtype = self.channels, self.dtype
        self.dwconv = Conv(channels, 3, groups=channels, dtype=dtype, use_bias=True, torch_init=True)
        self.linear = Dense(2 * channels, dtype=dtype, kernel_init=_normal)
        self.out_norm = NORM(dtype=dtype)
        self.out_linear = Dense(channels, dtype=dtype, kernel_init=_normal)
        if self.folded:
            self.k_exp = self.param("k_exp", nn.initializers.ones, (*self.folded, channels), jnp.float32)
        else:
            self.to_k = Dense(channels, dtype=jnp.float32, kernel_init=_normal)

    def source(self, x):
        """Return (heat source, gate), both [B, H, W, C], of a map x [B, H, W, C]."""
        return jnp.split(self.linear(self.dwconv(x)), 2, axis=-1)

    def decay(self, embedding):
        """Return the decay factors float32 [..., H, W, C] of frequency embeddings [..., H, W, C], None if folded."""
        return self.k_exp if self.folded else decay(jax.nn.relu(self.to_k(embedding)))

    def finish(self, u, gate):
        """Return the block's output [B, H, W, C] of the conducted heat and the gate, both [B, H, W, C]."""
        return self.out_linear(self.out_norm(u) * jax.nn.silu(gate))

    def __call__(self, x, embedding):
        u, gate = self.source(x)
        return self.finish(heat_conduction(u, self.decay(embedding)), gate)


class Mlp(nn.Module):
    """Linear, exact GELU, linear, drawn as the 1x1 convolutions of the release: x [B, H, W, C] -> [B, H, W, C]."""

    ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        options = dict(dtype=self.dtype, use_bias=True, torch_init=True)
        x = gelu(Conv(int(channels * self.ratio), name="fc1", **options)(x))
        return Conv(channels, name="fc2", **options)(x)


class HeatBlock(nn.Module):
    """Residual block: x + heat, then x + MLP, each with a layer norm before the branch or after it. [B, H, W, C] -> the same.

    embedding: frequency embeddings [H, W, C] of the stage; None if folded. `heat` may be overridden.

    Attributes:
      post_norm: whether the norms follow the branches.
      layer_scale: whether each branch has a learnt gain for every channel, 1e-5 at first.
      folded: as of `Heat2D`.
    """

    post_norm: bool = False
    layer_scale: bool = False
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    folded: tuple = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, embedding, train):
        x = self._add(x, 1, lambda y: self.heat(y, embedding, train), train)
        return self._add(x, 2, Mlp(self.mlp_ratio, self.dtype, name="mlp"), train)

    def heat(self, x, embedding, train):
        """Return the heat branch [B, H, W, C] of x [B, H, W, C]."""
        del train
        return Heat2D(x.shape[-1], self.folded, self.dtype, name="op")(x, embedding)

    def _add(self, x, n, branch, train):
        norm = NORM(dtype=self.dtype, name=f"norm{n}")
        y = norm(branch(x)) if self.post_norm else branch(norm(x))
        if self.layer_scale:
            gain = self.param(f"gamma{n}", nn.initializers.constant(1e-5), (x.shape[-1],), jnp.float32)
            y = y * gain.astype(self.dtype)
        return residual(x, DropPath(self.drop_path)(y, train))


def fit(table, size, how):
    """Return frequency embeddings [R, R, C] for maps of `size` = (H, W), [H, W, C].

    "bicubic" keeps the diffusivity of each frequency in cycles a cell, so a crop and its whole image blur alike. "padded" keeps
    that of each mode's number; new modes are zero, so their diffusivity is that of the bias alone.
    """
    if how == "bicubic":
        return bicubic.resize(table, size)
    if how != "padded":
        raise UserError(f"embedding is {how!r}; vHeat's frequency embeddings are 'bicubic' or 'padded'")
    table = table[: size[0], : size[1]]
    return jnp.pad(table, (*((0, new - old) for old, new in zip(table.shape, size)), (0, 0)))


class VHeat(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, width], out).

    `out` holds `stem` and `stage1` ..., each before the downsampling that follows. Features are behind a layer norm, as in the
    release, whose classifier is linear on their mean. H and W must be multiples of `stride`, and may differ.

    Attributes:
      dims, depths: channels and blocks of each stage.
      post_norm, layer_scale, mlp_ratio: as of `HeatBlock`.
      stem_stride: 4 in the release. At 2 and 1, for small images, one or both of its convolutions do not stride; the weights
        are the same.
      last_stride: of the last downsampling. At 1 the weights are the same.
      grid: cells a side of the first stage's frequency embeddings; half of it in each further stage. 0: those of
        `for_images`, or else of the release.
      embedding: how embeddings are fitted to maps of another size, see `fit`.
      folded: whether each block holds its decay factors for images of `image_size`, the only size that it then takes, and no
        embeddings. For inference, see `fold`.
      outnorm: whether each stage's map in `out` has a layer norm of its own, the last one instead of the features', as in
        the release's detectors.
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    dims: tuple = (96, 192, 384, 768)
    depths: tuple = (2, 2, 6, 2)
    post_norm: bool = False
    layer_scale: bool = False
    mlp_ratio: float = 4.0
    stem_stride: int = 4
    last_stride: int = 2
    grid: int = 0
    embedding: str = "bicubic"
    folded: bool = False
    outnorm: bool = False
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    has_batch_norm = False

    @property
    def stride(self):
        return self.stem_stride * 2 ** (len(self.dims) - 2) * self.last_stride

    @property
    def width(self):
        return self.dims[-1]

    @property
    def image_size(self):
        return self._grid * self.stem_stride

    @property
    def one_size(self):
        return self.folded

    @property
    def least_size(self):
        return self.image_size if self.folded else self.stride

    @property
    def _grid(self):
        return self.grid or _RELEASED // self.stem_stride

    @nn.nowrap
    def for_images(self, size):
        return self if self.grid else self.clone(grid=size // self.stem_stride)

    @nn.nowrap
    def resize(self, params, size):
        grid = size // self.stem_stride
        if grid == self._grid:
            return Resized(params)
        if self.folded:
            raise UserError(
                f"image_size {size} is not accepted: this vHeat is folded for images of {self.image_size} pixels"
            )
        tables = {
            f"freq_embed_{n}": fit(params[f"freq_embed_{n}"], (max(1, grid >> n),) * 2, self.embedding)
            for n in range(len(self.dims))
        }
        notice = (
            f"frequency embeddings of {self._grid} x {self._grid} modes made {grid} x {grid} ({self.embedding}) for images "
            f"of {size} pixels"
        )
        return Resized({**params, **tables}, {"grid": grid}, notice)

    @nn.nowrap
    def fold(self, params, size):
        if self.folded:
            return self.resize(params, size)
        folded = {name: leaf for name, leaf in params.items() if not name.startswith("freq_embed_")}
        for n, side in enumerate(self._sides(size)):
            table = fit(params[f"freq_embed_{n}"], (side, side), self.embedding)
            for j in range(self.depths[n]):
                block = params[f"layers_{n}_{j}"]
                op = {name: leaf for name, leaf in block["op"].items() if name != "to_k"}
                op["k_exp"] = Heat2D(self.dims[n]).apply({"params": block["op"]}, table, method="decay")
                folded[f"layers_{n}_{j}"] = {**block, "op": op}
        notice = f"decay factors folded for images of {size} pixels"
        return Resized(folded, {"folded": True, "grid": size // self.stem_stride}, notice)

    @nn.nowrap
    def layer_of(self, name):
        kind, _, numbers = name.split("/")[0].partition("_")
        if kind == "layers":
            stage, block = map(int, numbers.split("_"))
            return sum(self.depths[stage:]) - block
        if kind == "freq":  # of the first block that reads it
            return sum(self.depths[int(numbers.removeprefix("embed_")) :])
        if kind.startswith("outnorm"):
            return sum(self.depths[int(kind.removeprefix("outnorm")) + 1 :])
        return 0 if kind == "norm" else sum(self.depths) + 1

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.stride)
        if self.folded and train:
            raise UserError("a folded vHeat is for inference alone: its decay factors are no parameters to train")
        if self.folded and set(images.shape[1:3]) != {self.image_size}:
            height, width = images.shape[1:3]
            raise UserError(
                f"images of {height} x {width} pixels: this vHeat is folded for {self.image_size} x {self.image_size}"
            )
        x = ConvStem(self.dims[0], STEM_NORM, self.stem_stride, self.dtype, name="patch_embed")(images)
        out, block, rates = {"stem": x}, remat(HeatBlock, self.remat, 2), drop_path_rates(self.drop_path, self.depths)
        sides = self._sides(self.image_size)
        for n, channels in enumerate(self.dims):
            embedding, last = None, n == len(self.dims) - 1
            if not self.folded:
                modes = max(1, self._grid >> n)
                table = self.param(f"freq_embed_{n}", _normal, (modes, modes, channels), jnp.float32)
                embedding = fit(table, x.shape[1:3], self.embedding)
            for j, rate in enumerate(rates[n]):
                x = block(
                    self.post_norm,
                    self.layer_scale,
                    self.mlp_ratio,
                    rate,
                    (sides[n], sides[n]) if self.folded else (),
                    self.dtype,
                    name=f"layers_{n}_{j}",
                )(x, embedding, train)
            out[f"stage{n + 1}"] = x
            if self.outnorm:
                out[f"stage{n + 1}"] = self._norm(f"outnorm{n}")(x)
            if not last:
                stride = self.last_stride if n == len(self.dims) - 2 else 2
                x = Downsampling(self.dims[n + 1], NORM, stride, self.dtype, name=f"layers_{n}_{self.depths[n]}")(x)
        return (out[f"stage{len(self.dims)}"] if self.outnorm else self._norm("norm")(x)), out

    def _norm(self, name):
        return NORM(dtype=self.dtype, name=name)

    def _sides(self, size):
        """Return the cells a side of each stage's map for images of `size` pixels."""
        sides = [size // self.stem_stride // 2**n for n in range(len(self.dims))]
        return [*sides[:-1], sides[-1] * 2 // self.last_stride]
