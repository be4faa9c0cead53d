"""Run an encoder inside a method: its variables, random keys and running statistics."""

import jax

from qbheat_jax.models.encoder import pooled

__all__ = ["encode", "pooled", "variables"]


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
