"""Transformer decoders of the masking methods: their config fields and checks."""

import jax.numpy as jnp

from qbheat_jax.config import POSITIVE, Field, at_least, refuse

FIELDS = {
    "decoder.width": Field(512, "channels of the decoder's blocks (our choice; of MAE too)", POSITIVE),
    "decoder.depth": Field(
        4, "transformer blocks of the decoder; 0: purely linear (our choice; 8 in MAE)", at_least(0)
    ),
    "decoder.heads": Field(8, "attention heads of the decoder's blocks (our choice; 16 in MAE)", POSITIVE),
}


def check(values):
    """Raise UserError where the width does not divide over the heads and the position code."""
    width, heads = values["decoder.width"], values["decoder.heads"]
    if width % heads or width % 4:
        refuse("decoder.width", width, f"a multiple of 4 and of decoder.heads={heads}")


def options(config):
    """Return the keyword arguments of a decoder module: width, depth, heads, dtype, remat."""
    return {**config.decoder.to_dict(), "dtype": jnp.dtype(config.dtype), "remat": config.remat}
