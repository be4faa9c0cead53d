"""Config fields of a probe, and what it shares with the run that it probes."""

import dataclasses

from qbheat_jax.config import (
    BELOW_ONE,
    COUNTS,
    NUMBERS,
    POSITIVE,
    SEED,
    Field,
    Table,
    at_least,
    refuse,
)
from qbheat_jax.data.fields import DATA, FEW_SHOT
from qbheat_jax.data.specs import clips, image
from qbheat_jax.models.fields import ENCODER
from qbheat_jax.train.fields import LOGGERS, MONITORS

# Votes are exp(-distance / temperature), distance at most 2: below this all of them could be 0 in float64.
_TEMPERATURES = (lambda v: len(v) > 0 and min(v) >= 0.003, "one or more numbers, each at least 0.003")

# Protocols of segmentation: they learn masks from the cells.
SEGMENTS = ("seg-lin", "seg-knn")

# The fields by which a run and a probe of it name the same images and the same encoder.
SHARED = (*DATA, *ENCODER, "image_size")


def check(values):
    """Raise UserError where protocol, optimizer and augmentation do not go together."""
    protocol = values["protocol"]
    if protocol in ("knn", *SEGMENTS) and values["augment"]:
        refuse("augment", True, f"False with protocol={protocol!r}, which takes images without augmentation")
    if protocol in SEGMENTS and values["data.fraction"] < 1:
        refuse(
            "data.fraction", values["data.fraction"], f"1 with protocol={protocol!r}: images with masks have no class"
        )
    if protocol in ("knn", "seg-knn"):
        return
    if values["optimizer"] == "ridge":
        if protocol != "lin":
            refuse("optimizer", "ridge", f"sgd, lars or adamw where protocol is {protocol!r}")
        if values["augment"]:
            refuse("augment", True, "False with optimizer='ridge', which needs all features at once")
        if min(values["weight_decays"]) <= 0:
            refuse("weight_decays", values["weight_decays"], "numbers above 0 with optimizer='ridge'")


PROBE = Table(
    {
        "seed": Field(0, "root of every random number of the probe", SEED),
        "protocol": Field(
            "lin",
            "lin: a linear classifier on pooled features; tran-N: N transformer blocks before it; knn: neighbours' votes; "
            "seg-lin, seg-knn: segmentation by a linear classifier of every cell, and by the votes of the nearest cells",
            ("lin", "knn", *(f"tran-{n}" for n in range(1, 13)), *SEGMENTS),
        ),
        **DATA,
        **ENCODER,
        "data.source": Field("", "labelled images; empty: those the encoder was trained on"),
        "encoder.name": Field("", "the encoder of --init random; a directory brings its own"),
        "image_size": Field(0, "pixels a side; 0: as the encoder was trained", at_least(0)),
        "data.holdout": Field(
            0.1, "share of train to choose hyper-parameters on, where the source has no val split", BELOW_ONE
        ),
        **FEW_SHOT,
        "augment": Field(
            False, "random crops and mirror images in every epoch, encoded as they come; without it features are cached"
        ),
        **image.FIELDS,
        **clips.OWN,
        "data.frames": dataclasses.replace(
            clips.OWN["data.frames"], doc="clips of --init random: frames of each clip; a run brings its own"
        ),
        "batch_size": Field(128, "examples a step of the head, and images encoded at once", POSITIVE),
        "total_epochs": Field(90.0, "passes over the training features", POSITIVE),
        "optimizer": Field(
            "sgd", "the head's optimizer; ridge: closed form, for lin only", ("sgd", "lars", "adamw", "ridge")
        ),
        "learning_rates": Field(
            (0.1,), "rates for a batch of 256; all are trained, held-out images choose the best", NUMBERS
        ),
        "weight_decays": Field((0.0,), "each is trained with every learning rate; for ridge, its strengths", NUMBERS),
        "warmup_epochs": Field(0.0, "linear warm-up; then a cosine to 0", at_least(0)),
        "momentum": Field(0.9, "momentum of sgd and lars", BELOW_ONE),
        "standardise": Field(True, "standardise features by the mean and variance over train"),
        "refit": Field(True, "after choosing, train once more on train and held-out images together"),
        "label_smoothing": Field(0.0, "share of the target spread over all classes", BELOW_ONE),
        "head.width": Field(0, "channels of tran-N's blocks; 0: the encoder's", at_least(0)),
        "head.heads": Field(8, "attention heads of tran-N's blocks", POSITIVE),
        "head.pool": Field(1, "cells a side averaged into one before the blocks; 1: no averaging", POSITIVE),
        "head.dropout": Field(0.0, "dropout in the blocks", BELOW_ONE),
        "head.drop_path": Field(0.0, "drop path in the blocks", BELOW_ONE),
        "knn.neighbours": Field(
            (10.0, 20.0, 100.0, 200.0), "numbers of neighbours that vote; the best is chosen", COUNTS
        ),
        "knn.temperatures": Field(
            (0.02, 0.07, 0.2), "votes weigh exp(similarity / temperature); the best is chosen", _TEMPERATURES
        ),
        "knn.bank": Field(
            1 << 16, "seg-knn: training cells that may be neighbours, drawn by the seed where there are more", POSITIVE
        ),
        "cache_gib": Field(
            8.0,
            "features larger than this are kept in memory-mapped files; standardising takes as much memory again",
            POSITIVE,
        ),
        **MONITORS,
        **LOGGERS,
    },
    check,
)
