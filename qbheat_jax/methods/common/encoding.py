"""Run an encoder inside a method: its variables, random keys and running statistics."""

import jax
import jax.numpy as jnp

from qbheat_jax.models.encoder import pooled as pooled
from qbheat_jax.ops import spread


def variables(params, state, part="encoder"):
    """Return the variables that `apply` takes for one part of a method's parameters and state."""
    return {"params": params[part], **({"batch_stats": state[part]} if part in state else {})}


def encode(encoder, params, state, images, rng, train, **options):
    """Return (features, out, state); training updates the encoder's running statistics in the state.

    Args:
      encoder: Linen module, see the contract of `models`.
      params, state: The method's.
      images: Normalised float32 [B, H, W, 3].
      rng: Key of dropout and drop path; None outside training.
      train: Whether batch norm, dropout and drop path are those of training.
      options: Further keyword arguments of the encoder.
    """
    known = variables(params, state)
    if not train:
        return *encoder.apply(known, images, **options), state
    rngs = dict(zip(("dropout", "drop_path"), jax.random.split(rng)))
    (features, out), updated = encoder.apply(known, images, True, mutable=["batch_stats"], rngs=rngs, **options)
    if "encoder" in state:
        state = {**state, "encoder": updated["batch_stats"]}
    return features, out, state


def at_size(encoder, params, size):
    """Return (encoder, its parameters) for images of `size` pixels a side; gradients reach the given parameters."""
    resized = encoder.resize(params, size)
    return (encoder.clone(**resized.options) if resized.options else encoder), resized.params


def project(projector, params, state, x, train):
    """Return (outputs of the method's projector for float32 [B, C], state); training updates its running statistics."""
    known = variables(params, state, "projector")
    if not train or "projector" not in state:
        return projector.apply(known, x), state
    outputs, updated = projector.apply(known, x, True, mutable=["batch_stats"])
    return outputs, {**state, "projector": updated["batch_stats"]}


def collections(made):
    """Return {"params": {part: tree}, "batch_stats": {part: tree}} of {part: variables}."""
    return {
        name: {part: tree[name] for part, tree in made.items() if name in tree} for name in ("params", "batch_stats")
    }


def spread_of(vectors, batch, train):
    """Return `spread.figures` of pooled features [B, C]; {} in evaluation, whose figures do not depend on the batch's size."""
    return spread.figures(vectors, batch["mask"]) if train else {}


def l2_normalize(x):
    """Return [..., C] scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
