"""Running an encoder inside an objective: its random numbers and its batch statistics, in one place."""

import jax
import jax.numpy as jnp


def variables(params, mutable, part="encoder"):
    """What `apply` takes for one part of an objective's parameters and statistics."""
    return {"params": params[part], **({"batch_stats": mutable[part]} if part in mutable else {})}


def encode(encoder, params, mutable, images, rng, train, **options):
    """(features, out, mutable with the encoder's statistics updated where it trains).

    images: normalised float32 [B, H, W, 3]. rng: for drop path; None with train=False. options: of the encoder's call.
    """
    known = variables(params, mutable)
    if not train:
        return *encoder.apply(known, images, **options), mutable
    rngs = dict(zip(("dropout", "drop_path"), jax.random.split(rng)))
    (features, out), updated = encoder.apply(known, images, True, mutable=["batch_stats"], rngs=rngs, **options)
    if "encoder" in mutable:
        mutable = {**mutable, "encoder": updated["batch_stats"]}
    return features, out, mutable


def pooled(features, out):
    """One vector an image, float32 [B, C]: the class token where there is one, otherwise the mean over the cells."""
    return out["class_token"].astype(jnp.float32) if "class_token" in out else features.astype(jnp.float32).mean((1, 2))
