"""Running an encoder inside an objective: its random numbers and its batch statistics, in one place."""

import jax
import jax.numpy as jnp


def variables(params, state, part="encoder"):
    """What `apply` takes for one part of an objective's parameters and statistics."""
    return {"params": params[part], **({"batch_stats": state[part]} if part in state else {})}


def encode(encoder, params, state, images, rng, train, **options):
    """(features, out, the state with the encoder's statistics updated where it trains).

    images: normalised float32 [B, H, W, 3]. rng: for drop path; None with train=False. options: of the encoder's call.
    """
    known = variables(params, state)
    if not train:
        return *encoder.apply(known, images, **options), state
    rngs = dict(zip(("dropout", "drop_path"), jax.random.split(rng)))
    (features, out), updated = encoder.apply(known, images, True, mutable=["batch_stats"], rngs=rngs, **options)
    if "encoder" in state:
        state = {**state, "encoder": updated["batch_stats"]}
    return features, out, state


def pooled(features, out):
    """One vector an image, float32 [B, C]: the class token where there is one, otherwise the mean over the cells."""
    return out["class_token"].astype(jnp.float32) if "class_token" in out else features.astype(jnp.float32).mean((1, 2))
