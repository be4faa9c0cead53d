"""Pieces that several methods share: targets, masks, decoders, EMA, running an encoder."""
