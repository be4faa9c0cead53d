"""MMHCO-HAR (arXiv 2504.05830): RGB frames and event frames through one trunk of vHeat blocks, fused by a router.

Frames are never mixed in time. The modalities share all weights but the chains of their frequency embeddings. What the paper
states and its released program does differ in a few places; `fve_mode`, `fve_pool` and `routing` choose.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.layers import BatchNorm, Dense, LayerNorm, check_size, remat

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
    """Return the module's next key of `dropout`; a fixed one where the caller gave none, as in evaluation."""
    return module.make_rng("dropout") if module.has_rng("dropout") else jax.random.key(0)


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
        self.sow("intermediates", "router_logits", logits)
        routing = self._routing(train)
        weights = route(logits, routing, random_key(self) if routing == "gumbel" else None)
        weights = weights.astype(self.dtype).reshape(batch, two, frames, 1, 1, CANDIDATES)

        both = x.transpose(0, 2, 3, 4, 1, 5).reshape(batch, frames, height, width, two * channels)
        gate = Dense(two * channels, dtype=self.dtype, kernel_init=_torch_init, name="gate")(both)
        gate = BatchNorm(use_running_average=not train, unbiased=True, dtype=self.dtype, name="gate_bn")(gate)
        gate = jax.nn.sigmoid(gate).reshape(batch, frames, height, width, two, channels).transpose(0, 4, 1, 2, 3, 5)
        factors = (1.0, 1.0 - x[:, ::-1], gate)
        return x * sum(weights[..., n : n + 1] * factor for n, factor in enumerate(factors))

    def _routing(self, train):
        if self.routing == "gumbel":
            return "gumbel" if train else "argmax"
        return "gumbel" if self.routing == "sampled" else self.routing
