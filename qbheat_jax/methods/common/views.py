"""Several crops of every image: augment them on the device, encode them, project them. Config fields of their colours."""

import jax
import jax.numpy as jnp

from qbheat_jax.config import RANGE, Field, at_least, refuse
from qbheat_jax.data.specs import crops
from qbheat_jax.methods.common import encoding
from qbheat_jax.methods.common.colours import Colours
from qbheat_jax.ops import colour

FIELDS = {
    "views.jitter": Field(1.0, "multiplies the strengths of the method's colour jitter; 0: no jitter", at_least(0)),
    "views.blur": Field(True, "blur as many crops as the method's paper does; False: none"),
    "views.blur_sigma": Field((0.1, 2.0), "range of the blur in pixels (the papers', of 224 x 224 images)", RANGE),
}
VIEWS = 2  # full-size crops of every training image


def colours(config, strengths, blur_prob=0.5, solarise_prob=0.0):
    """Return the `Colours` of one kind of crop.

    Args:
      config: Config with FIELDS.
      strengths: The paper's jitter of brightness, contrast, saturation and hue.
      blur_prob, solarise_prob: The paper's.
    """
    given = config.views
    return Colours(
        colour.Jitter(*(given.jitter * strength for strength in strengths)),
        jitter_prob=0.8 if given.jitter else 0.0,
        blur_prob=blur_prob if given.blur else 0.0,
        sigma=tuple(given.blur_sigma),
        solarise_prob=solarise_prob,
    )


def check_local(config, encoder):
    """Raise UserError where the local crops of a config are no whole cells of the encoder."""
    size = crops.local_size(config)
    if config.data.local_crops and size % encoder.stride:
        refuse("data.local_size", size, f"a multiple of the stride of {config.encoder.name}, {encoder.stride}")


def augmented(batch, colours, pixels, rng):
    """Return the crops of a batch by size: [views float32 [B, 2, S, S, 3], local crops float32 [B, n, L, L, 3] if any].

    Crops have an axis of their own behind the batch's: joined with the batch in this order, devices exchange no images. In
    evaluation there is one crop, which both views show in colours of their own.

    Args:
      batch: image, image2, ... uint8 [B, H, W, 3].
      colours: `Colours` of the first view, the second view and the local crops.
      pixels: How images are normalised.
      rng: Key.
    """
    names = sorted((name for name in batch if name.startswith("image")), key=lambda name: int(name[5:] or 1))
    given = [batch[name] for name in (names if len(names) > 1 else names * VIEWS)]
    views, local = given[:VIEWS], given[VIEWS:]
    keys = jax.random.split(rng, 3)

    def coloured(colours, images, key):
        return pixels.normalise(colours(images.astype(jnp.float32) / 255.0, key) * 255.0)

    def alike(colours, images, key):
        return apart(coloured(colours, join(jnp.stack(images, 1)), key), len(images))

    if colours[0] == colours[1]:
        groups = [alike(colours[0], views, keys[0])]
    else:
        groups = [jnp.stack([coloured(*one) for one in zip(colours, views, keys)], 1)]
    if local:
        groups.append(alike(colours[2], local, keys[2]))
    return groups


def encode(encoder, params, state, groups, rng, train):
    """Return (pooled features float32 [B, V, C] of all crops, state). groups: as of `augmented`.

    All crops of one size are one batch, so batch norm is over all of them.
    """
    features, size = [], groups[0].shape[2]
    for images, key in zip(groups, (None, None) if rng is None else jax.random.split(rng)):
        sized, own = encoder, params["encoder"]
        if images.shape[2] != size:
            sized, own = encoding.at_size(encoder, own, images.shape[2])
        known = {**params, "encoder": own}
        maps, out, state = encoding.encode(sized, known, state, join(images), key, train)
        features.append(apart(encoding.pooled(maps, out), images.shape[1]))
    return jnp.concatenate(features, 1), state


def project(projector, params, state, features, train):
    """Return (projections float32 [B, V, D] of features [B, V, C], state)."""
    z, state = encoding.project(projector, params, state, join(features), train)
    return apart(z, features.shape[1]), state


def join(x):
    """Return [B * V, ...] of [B, V, ...]."""
    return x.reshape(-1, *x.shape[2:])


def apart(x, views):
    """Return [B, V, ...] of [B * V, ...]."""
    return x.reshape(-1, views, *x.shape[1:])
