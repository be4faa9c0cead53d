"""MMHCO-HAR (arXiv 2504.05830): RGB frames and event frames through one trunk of vHeat blocks, fused by a router.

Frames are never mixed in time. The modalities share all weights but the chains of their frequency embeddings. What the paper
states and its released program does differ in a few places; `fve_mode`, `fve_pool` and `routing` choose.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax import rng
from qbheat_jax.models.conv_stem import ConvStem, Downsampling
from qbheat_jax.models.encoder import Resized
from qbheat_jax.models.layers import BatchNorm, Conv, Dense, check_size, drop_path_rates, remat
from qbheat_jax.models.vheat import NORM, STEM_NORM, Heat2D, HeatBlock, VHeat, fit
from qbheat_jax.ops.heat_conduction import heat_conduction

MODALITIES = ("rgb", "event")
FVE_MODES = ("feature", "noise", "static")
FVE_POOLS = ("sample", "batch")
ROUTINGS = ("gumbel", "argmax", "soft", "sampled")
CANDIDATES = 3

_normal = nn.initializers.normal(0.02)


def route(logits, routing, key=None):
    """Return the weights of the candidates, float32 [..., 3], from a router's logits [..., 3].

    routing: "argmax" takes the likeliest, "gumbel" draws one by `key` (Gumbel-softmax at temperature 1), "soft" weighs all by
    their softmax. The gradient of the first two is that of the softmax (straight-through).
    """
    if routing == "gumbel":
        logits = logits + jax.random.gumbel(key, logits.shape)
    weights = jax.nn.softmax(logits)
    if routing == "soft":
        return weights
    hard = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    return hard + (weights - jax.lax.stop_gradient(weights))


def noise(key, shape):
    """Draw what the released program puts in the place of a stage's mean features: float32 of this shape."""
    return 0.02 * jax.random.normal(key, shape)


def random_key(module):
    """Return the module's next key of `dropout`; where the caller gave none, as in evaluation, one fixed by its name."""
    if module.has_rng("dropout"):
        return module.make_rng("dropout")
    return rng.fold(jax.random.key(0), "/".join(module.path))


def show(module, name, value):
    """Give a value to callers that ask for flax's `intermediates`."""
    if not module.is_initializing():
        module.sow("intermediates", name, value)


class Router(nn.Module):
    """Logits of the candidates, float32 [N, 3], of the mean features of frames, float32 [N, C]."""

    @nn.compact
    def __call__(self, x, train):
        for n, features in enumerate((256, 32)):
            x = nn.leaky_relu(Dense(features, kernel_init=_normal, name=f"fc{n}")(x), 0.1)
            x = BatchNorm(use_running_average=not train, unbiased=True, name=f"bn{n}")(x)
        return Dense(CANDIDATES, kernel_init=_normal, name="fc2")(x)


class Fusion(nn.Module):
    """Fuse two maps of equal shape: every frame of each takes its half of one of three candidates.

    x [B, 2, T, H, W, C] -> the same shape. With a frame r of one map and the frame e of the other at the same time, the
    candidates for r are r itself (specific), r - r e (discriminative), and r s (complementary). s is its half of a gate on
    both, sigmoid(BN(linear([r | e]))). A `Router` chooses for each frame by its mean over H and W.
    """

    routing: str = "gumbel"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        batch, two, frames, height, width, channels = x.shape
        logits = Router(name="router")(x.astype(jnp.float32).mean((3, 4)).reshape(-1, channels), train)
        show(self, "router_logits", logits)
        routing = self._routing(train)
        weights = route(logits, routing, random_key(self) if routing == "gumbel" else None)
        weights = weights.astype(self.dtype).reshape(batch, two, frames, 1, 1, CANDIDATES)

        both = x.transpose(0, 2, 3, 4, 1, 5).reshape(-1, height, width, two * channels)
        gate = Conv(two * channels, dtype=self.dtype, use_bias=True, torch_init=True, name="gate")(both)
        gate = BatchNorm(use_running_average=not train, unbiased=True, dtype=self.dtype, name="gate_bn")(gate)
        gate = jax.nn.sigmoid(gate).reshape(batch, frames, height, width, two, channels).transpose(0, 4, 1, 2, 3, 5)
        factors = (1.0, 1.0 - x[:, ::-1], gate)
        return x * sum(weights[..., n : n + 1] * factor for n, factor in enumerate(factors))

    def _routing(self, train):
        if self.routing == "gumbel":
            return "gumbel" if train else "argmax"
        return "gumbel" if self.routing == "sampled" else self.routing


class FusedHeat(Heat2D):
    """`Heat2D` on two modalities with a `Fusion` after the conduction: x [B * 2 * T, H, W, C] -> the same shape.

    embedding: frequency embeddings of each modality, float32 [B or 1, 2, 1, H, W, C].
    """

    routing: str = "gumbel"

    def setup(self):
        super().setup()
        self.fusion = Fusion(self.routing, self.dtype)

    def __call__(self, x, embedding, frames, train):
        u, gate = self.source(x)
        u = heat_conduction(u.reshape(-1, 2, frames, *u.shape[1:]), self.decay(embedding))
        return self.finish(self.fusion(u, train).reshape(x.shape), gate)


class FusedBlock(HeatBlock):
    """`HeatBlock` with `FusedHeat`, of clips of `frames` frames."""

    frames: int = 1
    routing: str = "gumbel"

    def heat(self, x, embedding, train):
        return FusedHeat(x.shape[-1], (), self.dtype, self.routing, name="op")(x, embedding, self.frames, train)


class ChainStep(nn.Module):
    """Frequency embeddings [N, H, W, C] of one stage to those of the next: 3x3 convolution without bias, batch norm.

    With N = 1, statistics are over the positions of one map. Children: conv, bn.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        x = Conv(self.channels, 3, self.stride, torch_init=True, name="conv")(x)
        return BatchNorm(use_running_average=not train, unbiased=True, name="bn")(x)


class MMHCO(VHeat):
    """The encoder: clips [B, 2, T, H, W, 3] -> (features [B, H / stride, W / stride, width], out), for any T.

    Axis 1 holds the RGB frames and the event frames. Features are the mean over modalities and frames of the last maps, behind
    the layer norm. `out` holds `stem` and `stage1` ... [B, 2, T, h, w, C], and `frames` [B, 2 T, width], the mean of each
    normed map. Fields of `VHeat` have its meaning; `grid` is that of `freq_embed_rgb` and `freq_embed_event`.

    The frequency embeddings F of a modality are a chain: a learnt table times a factor in the first stage, and BN(conv(F))
    times a factor in each further one.

    Attributes:
      fve_mode: the factor. "feature" is the mean of the features that enter the stage, as in the paper. "noise" is that of the
        released program: normal noise of deviation 0.02 in every pass, evaluation included, and no gradient for the chain.
        "static" is 1.
      fve_pool: what "feature" averages over: the frames of each clip ("sample"), or of the batch ("batch", as published), by
        which the features of a clip depend on its companions.
      routing: how the router chooses. "gumbel" draws in training and takes the likeliest in evaluation, "argmax" takes it in
        both, "soft" weighs all candidates. "sampled" draws in evaluation too, as the released program.

    Draws take the keys of `dropout`; where none is given, as in this package's evaluations, they are the same every time.
    """

    fve_mode: str = "feature"
    fve_pool: str = "sample"
    routing: str = "gumbel"
    has_batch_norm = True
    takes_clips = True
    fold = None  # type: ignore[assignment]
    own = r"freq_.*|layers_\d+_\d+/op/fusion/.*"

    @nn.nowrap
    def adopt(self, other, params):
        """Begin with a vHeat of the same sizes, without its frequency embeddings, as the released program does."""
        sizes = ("dims", "depths", "post_norm", "layer_scale", "mlp_ratio")
        same = type(other) is VHeat and all(getattr(other, name) == getattr(self, name) for name in sizes)
        if not same or other.folded or other.outnorm:
            return None
        return {name: leaf for name, leaf in params.items() if not name.startswith("freq_embed_")}

    @nn.nowrap
    def example_shape(self, side, frames=1):
        return (2, frames, side, side, 3)

    @nn.nowrap
    def picture(self, images):
        """Return the mean RGB frame and the mean event frame side by side in the channels: [B, H, W, 6].

        Features are means over frames, so they do not know the order that a single frame has.
        """
        mean = images.astype(jnp.float32).mean(2)
        mean = jnp.round(mean).astype(images.dtype) if images.dtype == jnp.uint8 else mean.astype(images.dtype)
        return jnp.concatenate([mean[:, 0], mean[:, 1]], -1)

    @property
    def picture_channels(self):
        return 6

    @nn.nowrap
    def resize(self, params, size):
        grid, old = size // self.stem_stride, self._grid
        if grid == old:
            return Resized(params)
        names = [f"freq_embed_{modality}" for modality in MODALITIES]
        tables = {name: fit(params[name], (grid, grid), self.embedding) for name in names}
        notice = f"frequency embeddings of {old} x {old} modes made {grid} x {grid} for images of {size} pixels"
        return Resized({**params, **tables}, {"grid": grid}, notice)

    @nn.nowrap
    def layer_of(self, name):
        top = name.split("/")[0]
        if top.startswith("freq_embed"):
            return sum(self.depths)
        if top.startswith("freq_conv"):  # freq_conv1_rgb makes the second stage's
            return sum(self.depths[int(top[len("freq_conv")]) :])
        return super().layer_of(name)

    @nn.compact
    def __call__(self, clips, train=False):
        batch, _, frames = clips.shape[:3]
        images = clips.reshape(-1, *clips.shape[3:])
        check_size(images, self.stride)

        def by_clip(x):
            return x.reshape(batch, 2, frames, *x.shape[1:])

        x = ConvStem(self.dims[0], STEM_NORM, self.stem_stride, self.dtype, name="patch_embed")(images)
        out, block, rates = (
            {"stem": by_clip(x)},
            remat(FusedBlock, self.remat, 2),
            drop_path_rates(self.drop_path, self.depths),
        )
        chains, stride = None, 1
        for n, channels in enumerate(self.dims):
            chains = self._chains(chains, n, stride, by_clip(x), train)
            show(self, f"fve{n}", chains)
            for j, rate in enumerate(rates[n]):
                x = block(
                    self.post_norm,
                    self.layer_scale,
                    self.mlp_ratio,
                    rate,
                    (),
                    self.dtype,
                    frames,
                    self.routing,
                    name=f"layers_{n}_{j}",
                )(x, jnp.stack(chains, 1)[:, :, None], train)
            out[f"stage{n + 1}"] = by_clip(x)
            if n < len(self.dims) - 1:
                stride = self.last_stride if n == len(self.dims) - 2 else 2
                x = Downsampling(self.dims[n + 1], NORM, stride, self.dtype, name=f"layers_{n}_{self.depths[n]}")(x)
        x = by_clip(self._norm("norm")(x)).astype(jnp.float32)
        out["frames"] = x.mean((3, 4)).reshape(batch, 2 * frames, -1).astype(self.dtype)
        return x.mean((1, 2)).astype(self.dtype), out

    def _chains(self, chains, n, stride, x, train):
        """Return the frequency embeddings of stage n of each modality, a list of float32 [B or 1, H, W, C].

        Args:
          chains: those of the stage before, None at first.
          stride: between the two stages.
          x: the features that enter the stage, [B, 2, T, H, W, C].
        """
        factors = self._factors(x, n)
        made = []
        for m, modality in enumerate(MODALITIES):
            if n == 0:
                shape = (self._grid, self._grid, x.shape[-1])
                table = self.param(f"freq_embed_{modality}", _normal, shape, jnp.float32)
                base = fit(table, x.shape[3:5], self.embedding)[None]
            else:
                base = ChainStep(x.shape[-1], stride, name=f"freq_conv{n}_{modality}")(chains[m], train)
            made.append(base * factors[m])
        return jax.lax.stop_gradient(made) if self.fve_mode == "noise" else made

    def _factors(self, x, n):
        """Return stage n's factor of each modality, float32 [B or 1, H, W, C] or 1, of features [B, 2, T, H, W, C]."""
        if self.fve_mode == "static":
            return 1.0, 1.0
        if self.fve_mode == "noise":
            keys = jax.random.split(jax.random.fold_in(random_key(self), n))
            return [noise(key, (1, *x.shape[3:])) for key in keys]
        mean = x.astype(jnp.float32).mean(2 if self.fve_pool == "sample" else (0, 2))
        return mean.swapaxes(0, 1) if self.fve_pool == "sample" else mean[:, None]


class ClipHead(nn.Module):
    """The classifier: `frames` [B, N, C] of an encoder's outputs -> logits float32 [B, classes], the mean of all N vectors'."""

    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features, out, train=False):
        x = nn.Dropout(self.dropout)(out["frames"].astype(jnp.float32), deterministic=not train)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.001), name="classifier")(x).mean(1)
