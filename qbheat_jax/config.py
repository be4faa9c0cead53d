"""Configs: what every field means, what it accepts, and how a file and the command line become one checked config.

A config file is a flat python file with `get_config()` that returns an `ml_collections.ConfigDict` (or dict) of the
fields it sets; everything else takes the default below. Fields are checked before anything is compiled, each mistake
in one sentence that names the field, the value and what would be accepted.

Durations are in steps unless the name says otherwise: wherever the table has `warmup` or `eval_every`, a config may
instead set `warmup_epochs`, `warmup_examples` or `warmup_percent` (of the run), see `optim.duration`.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import os
from typing import Any

import ml_collections
import numpy as np

from qbheat_jax.errors import UserError
from qbheat_jax.ops import heat, images, quarters

DETECTORS = ("dense", "detr")
UNITS = ("epochs", "examples", "percent")
_LENGTHS = ("total_steps", "total_epochs")
# What may differ when an interrupted run goes on: how it is watched, and where it is computed.
RESUMABLE = (
    "log_every", "eval_every", "images_every", "checkpoint_every", "keep", "mesh.", "remat", "data.workers",
    "data.processes", "data.prefetch", "data.max_bad_fraction", "data.tfds_dir", "data.cache_gib",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: `default` also gives the type. `accept` is a tuple of choices, or (predicate, words)."""

    default: Any
    doc: str
    accept: Any = None
    type: type = None
    duration: bool = False


def _at_least(low):
    return (lambda v: v >= low, f"a number that is at least {low}")


_POSITIVE = (lambda v: v > 0, "a number above 0")
_FRACTION = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
_SHARE_OF = (lambda v: 0 < v <= 1, "a number above 0, at most 1")
_BELOW_ONE = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
_RANGE = (lambda v: len(v) == 2 and 0 < v[0] <= v[1], "two numbers, low and high, 0 < low <= high")
_SHARE = (lambda v: _RANGE[0](v) and v[1] <= 1, "two numbers, low and high, 0 < low <= high <= 1")
_SEED = (lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295")
_AXIS = (lambda v: v >= 1 or v == -1, "a number of devices, or -1 for all that are left")
_NUMBERS = (lambda v: len(v) > 0 and all(x >= 0 for x in v), "one or more numbers, none negative")
_COUNTS = (lambda v: len(v) > 0 and all(x >= 1 and x == int(x) for x in v), "one or more whole numbers above 0")
# Votes are exp(-distance / temperature), distance at most 2: below this all of them could be 0 in float64.
_TEMPERATURES = (lambda v: len(v) > 0 and min(v) >= 0.003, "one or more numbers, each at least 0.003")
_PART = (lambda v: 0 < v <= 1, "a number above 0, at most 1")

_DATA = {
    "data.source": Field("photos", "where images come from: photos, tfds:NAME, folder:PATH, synthetic"),
    "data.tfds_dir": Field("", "where tensorflow-datasets keeps its data; empty: its own default"),
    "data.max_bad_fraction": Field(0.01, "stop when more than this share of the images cannot be read", _FRACTION),
    "data.workers": Field(0, "decoding threads of each process; 0: one for each core", _at_least(0)),
    "data.processes": Field(
        0,
        "no effect: JPEGs are decoded without the interpreter, so threads suffice; accepted for older configs",
        _at_least(0),
    ),
    "data.prefetch": Field(2, "batches made ready ahead of the step", _at_least(1)),
    "data.device_cache": Field(False, "keep the images on the accelerators, decoded once; needs no tensorflow"),
    "data.cache_size": Field(
        0, "longest side kept there in pixels, longer ones are scaled to it; 0: twice image_size", _at_least(0)
    ),
    "data.cache_gib": Field(8.0, "largest memory of a device that a split may take there", _POSITIVE),
}
_ENCODER = {
    "encoder.name": Field("mobile_former_w720", "the encoder, a name of models.registry"),
    "encoder.stride": Field(0, "pixels a cell, where the encoder leaves a choice; 0: its own", _at_least(0)),
    "encoder.drop_path": Field(0.0, "stochastic depth rate", _BELOW_ONE),
    "encoder.class_token": Field(False, "vit: a class token before the patches"),
    "encoder.position": Field("sincos", "vit: its position code, fixed or a learnt table", ("sincos", "learnt")),
    "encoder.grid": Field(0, "vit: cells a side of the learnt table", _at_least(0)),
    "dtype": Field(
        "float32", "type computed in; parameters, losses and norm statistics are float32", ("float32", "bfloat16")
    ),
}
_PIXELS = {
    "pixels": Field("imagenet", "how pixels are normalised for the encoder, see images.PIXELS", tuple(images.PIXELS))
}

PRETRAIN = {
    "seed": Field(0, "root of every random number of the run", _SEED),
    "objective": Field(
        "qbheat",
        "what is learnt from: qbheat, moco (MoCo-v2), mae (a vit alone), simmim, supervised",
        ("qbheat", "moco", "mae", "simmim", "supervised"),
    ),
    "init": Field("", "a run or ported checkpoint (directory) whose encoder is started from; empty: none"),
    **_DATA,
    "data.split": Field("train", "the split trained on"),
    "data.eval_split": Field("val", "the split whose loss is reported every eval_every steps; empty: none"),
    "data.crop_scale": Field((0.2, 1.0), "share of the image's area that a random-resized-crop keeps", _SHARE),
    "data.crop_ratio": Field((3 / 4, 4 / 3), "its aspect ratio", _RANGE),
    "data.flip": Field(True, "mirror half of the images"),
    "image_size": Field(256, "pixels a side of the images trained on", _POSITIVE),
    "batch_size": Field(1024, "examples a step, over all devices", _POSITIVE),
    "total_steps": Field(None, "length of the run in steps; exactly one of total_steps, total_epochs", _POSITIVE, int),
    "total_epochs": Field(None, "length of the run in passes over the split", _POSITIVE, float),
    **_ENCODER,
    **_PIXELS,
    "decoder.width": Field(512, "channels of the decoder's blocks (our choice; of MAE too)", _POSITIVE),
    "decoder.depth": Field(4, "its transformer blocks; 0: purely linear (our choice; 8 in MAE)", _at_least(0)),
    "decoder.heads": Field(8, "their attention heads (our choice; MAE's are 16)", _POSITIVE),
    "heat.propagator": Field("offset", "the map over a distance (offset is the paper's)", heat.PROPAGATORS),
    "heat.directions": Field(
        "untied", "one matrix a direction, or a step back as the inverse of one ahead", heat.DIRECTIONS
    ),
    "heat.norm": Field("none", "layer norm before the map (none is QB-Heat, layer is FINOLA)", heat.NORMS),
    "heat.init_scale": Field(0.0, "standard deviation of A and B at the start, times sqrt(width)", _at_least(0)),
    "quarter.placements": Field(
        "corners_center", "placements drawn from, uniformly (our choice)", tuple(quarters.PLACEMENT_SETS)
    ),
    "norm_pix": Field(False, "predict pixels normalised within each patch (our choice)"),
    "norm_pix_statistics": Field(
        1.0,
        "with norm_pix, weight of predicting each patch's mean and deviation too; 0: not (our choice)",
        _at_least(0),
    ),
    "hog": Field(
        0.0,
        "weight of predicting each patch's histogram of oriented gradients too, MaskFeat's target; 0: not (our choice)",
        _at_least(0),
    ),
    "loss_on": Field("masked", "cells that count (masked is the paper's, and MAE's and SimMIM's)", ("masked", "all")),
    "moco.queue": Field(65536, "keys kept to compare with, a multiple of batch_size", _POSITIVE),
    "moco.momentum": Field(0.999, "of the key encoder; of few steps less, such as 0.99", _BELOW_ONE),
    "moco.temperature": Field(0.2, "the similarities are divided by", _POSITIVE),
    "moco.width": Field(128, "numbers in a key", _POSITIVE),
    "moco.standardise": Field(
        False, "features to mean 0, variance 1 over the batch before the projector; for small encoders (our choice)"
    ),
    "moco.blur_share": Field(0.5, "share of the images that is blurred", _FRACTION),
    "moco.blur_sigma": Field((0.1, 2.0), "range of the blur in pixels (the paper's, of 224 x 224 images)", _RANGE),
    "mae.mask_ratio": Field(0.75, "share of the cells that the encoder does not see", _FRACTION),
    "simmim.mask_ratio": Field(0.6, "share of the masked patches", _SHARE_OF),
    "simmim.mask_size": Field(
        32, "pixels a side of a patch that is masked as one, a multiple of the stride", _POSITIVE
    ),
    "simmim.error": Field(
        "l1", "absolute error of plain pixels (the paper's), or target: as norm_pix and hog say", ("l1", "target")
    ),
    "supervised.label_smoothing": Field(0.0, "share of the target spread over all classes", _BELOW_ONE),
    "supervised.colour_jitter": Field(0.0, "random brightness, contrast and saturation, by up to this", _FRACTION),
    "head.classes": Field(0, "supervised: of its classifier; 0: those of the data", _at_least(0)),
    "learning_rate": Field(1.5e-4, "peak rate for a batch of 256; the run's is this times batch_size / 256", _POSITIVE),
    "warmup": Field(0, "linear warm-up; then a cosine to 0", _at_least(0), duration=True),
    "weight_decay": Field(0.05, "AdamW's, not on biases and norms", _at_least(0)),
    "adam_b1": Field(0.9, "AdamW's first decay", _BELOW_ONE),
    "adam_b2": Field(0.95, "AdamW's second decay", _BELOW_ONE),
    "clip_norm": Field(0.0, "largest norm of the gradient; 0: no clipping", _at_least(0)),
    "ema": Field(0.0, "decay of an average of the parameters, which then is what is evaluated; 0: none", _BELOW_ONE),
    "mesh.data": Field(-1, "devices over which the batch is split; -1: all that are left", _AXIS),
    "mesh.fsdp": Field(1, "devices over which batch and parameters are split", _AXIS),
    "mesh.model": Field(1, "devices over which heads and hidden units of transformer blocks are split", _AXIS),
    "accumulate": Field(
        1, "parts of a batch that go through one after the other, for their summed gradient; see state.py", _at_least(1)
    ),
    "remat": Field(
        "none",
        "what of a block is kept for its gradient, a policy of jax.checkpoint_policies (nothing_saveable: blocks are "
        "computed twice, the least memory); none: all of it",
        ("none", "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable"),
    ),
    "bn_groups": Field(
        1, "parts of a batch, each normalised by its own statistics; 1: batch norm is over all devices", _at_least(1)
    ),
    "log_every": Field(50, "steps between lines of metrics", _POSITIVE, duration=True),
    "eval_every": Field(0, "steps between evaluations; 0: only at the end", _at_least(0), duration=True),
    "images_every": Field(
        0, "steps between pictures in TensorBoard: reconstructions, features; 0: none", _at_least(0), duration=True
    ),
    "checkpoint_every": Field(
        1000, "steps between checkpoints; there is always one at the end", _POSITIVE, duration=True
    ),
    "keep": Field(3, "checkpoints kept", _POSITIVE),
}

# The fields by which a run and a probe of it name the same images and the same encoder.
SHARED = (*_DATA, *_ENCODER, "image_size")

_CROPS = {name: PRETRAIN[name] for name in ("data.crop_scale", "data.crop_ratio", "data.flip")}
_FEW = {
    "data.fraction": Field(
        1.0,
        "few-shot: the share of the labelled images that is used, the same number of each class, drawn by the seed",
        _PART,
    )
}

PROBE = {
    "seed": Field(0, "root of every random number of the probe", _SEED),
    "protocol": Field(
        "lin",
        "lin: a linear classifier on pooled features; tran-N: N transformer blocks before it; knn: neighbours' votes",
        ("lin", "knn", *(f"tran-{n}" for n in range(1, 13))),
    ),
    **_DATA,
    **_ENCODER,
    "data.source": Field("", "labelled images; empty: those the encoder was trained on"),
    "encoder.name": Field("", "the encoder of --init random; a directory brings its own"),
    "image_size": Field(0, "pixels a side; 0: as the encoder was trained", _at_least(0)),
    "data.holdout": Field(
        0.1, "share of train to choose hyper-parameters on, where the source has no val split", _BELOW_ONE
    ),
    **_FEW,
    "augment": Field(
        False, "random crops and mirror images in every epoch, encoded as they come; without it features are cached"
    ),
    **_CROPS,
    "batch_size": Field(128, "examples a step of the head, and images encoded at once", _POSITIVE),
    "total_epochs": Field(90.0, "passes over the training features", _POSITIVE),
    "optimizer": Field(
        "sgd", "of the head; ridge: least squares in closed form, lin alone", ("sgd", "lars", "adamw", "ridge")
    ),
    "learning_rates": Field(
        (0.1,), "for a batch of 256; all are trained, the best on held-out images is chosen", _NUMBERS
    ),
    "weight_decays": Field((0.0,), "all are trained, with every learning rate; of ridge, its strengths", _NUMBERS),
    "warmup_epochs": Field(0.0, "linear warm-up; then a cosine to 0", _at_least(0)),
    "momentum": Field(0.9, "of sgd and lars", _BELOW_ONE),
    "standardise": Field(True, "features to mean 0, variance 1 over train: a batch norm without gain and bias"),
    "refit": Field(True, "after choosing, train once more on train and held-out images together"),
    "label_smoothing": Field(0.0, "share of the target spread over all classes", _BELOW_ONE),
    "head.width": Field(0, "channels of tran-N's blocks; 0: the encoder's", _at_least(0)),
    "head.heads": Field(8, "their attention heads", _POSITIVE),
    "head.pool": Field(1, "cells a side averaged into one before them; 1: all are kept", _POSITIVE),
    "head.dropout": Field(0.0, "dropout in the blocks", _BELOW_ONE),
    "head.drop_path": Field(0.0, "drop path in the blocks", _BELOW_ONE),
    "knn.neighbours": Field((10.0, 20.0, 100.0, 200.0), "how many vote; the best number is chosen", _COUNTS),
    "knn.temperatures": Field(
        (0.02, 0.07, 0.2), "votes weigh exp(similarity / temperature); the best is chosen", _TEMPERATURES
    ),
    "cache_gib": Field(
        8.0,
        "features that take more memory than this are kept in memory-mapped files; standardising takes as much again",
        _POSITIVE,
    ),
}

ANALYSE = {
    "seed": Field(0, "which images are drawn, and the random encoder to compare with", _SEED),
    **{name: _DATA[name] for name in ("data.tfds_dir", "data.max_bad_fraction")},
    **_ENCODER,
    "data.source": Field("", "images, labels or not; empty: those the encoder was trained on"),
    "encoder.name": Field("", "the encoder of --init random; a directory brings its own"),
    "image_size": Field(0, "pixels a side; 0: as the encoder was trained", _at_least(0)),
    "batch_size": Field(64, "images encoded at once", _POSITIVE),
    "images": Field(
        500, "images that maps are fitted on, at most; half as many each to choose and to test", _at_least(4)
    ),
}

# The fields of the training loop that every run has.
_RUN = (
    *_LENGTHS, *_CROPS, "warmup", "weight_decay", "adam_b1", "adam_b2", "clip_norm", "ema", "mesh.data", "mesh.fsdp",
    "mesh.model", "accumulate", "remat", "bn_groups", "log_every", "eval_every", "checkpoint_every", "keep",
)  # fmt: skip

# Encoder and image size are those of `init` where it is a directory; the number of classes is the data's.
FINETUNE = {
    "seed": Field(0, "root of every random number of the run", _SEED),
    "objective": Field("finetune", "a classifier, trained from end to end", ("finetune",)),
    "init": Field("", "a run or ported checkpoint (directory) whose encoder is started from, or random"),
    **_DATA,
    "data.source": Field("", "labelled images; empty: those the encoder was trained on"),
    "data.split": Field("train", "the split trained on"),
    "data.eval_split": Field(
        "val", "the split that is watched every eval_every steps, unless it is the one tested on; empty: none"
    ),
    **_FEW,
    "image_size": Field(0, "pixels a side; 0: as the encoder was trained", _at_least(0)),
    "batch_size": Field(256, "examples a step, over all devices", _POSITIVE),
    **{name: PRETRAIN[name] for name in _RUN},
    **_ENCODER,
    "encoder.name": Field("", "the encoder of init random; a directory brings its own"),
    "encoder.drop_path": Field(0.1, "stochastic depth rate, that of init's own training gives way to it", _BELOW_ONE),
    **_PIXELS,
    "head.classes": Field(0, "set from the data", _at_least(0)),
    "head.dropout": Field(0.0, "dropout before the last layer", _BELOW_ONE),
    "mixup": Field(0.0, "alpha of mixup, images averaged in pairs; 0: none", _at_least(0)),
    "cutmix": Field(0.0, "alpha of cutmix, a box of one image put into another; 0: none", _at_least(0)),
    "label_smoothing": Field(0.1, "share of the target spread over all classes", _BELOW_ONE),
    "layer_decay": Field(
        0.75, "the learning rate of each layer is that of the next one, nearer to the output, times this", _PART
    ),
    "learning_rate": Field(5e-4, "peak rate for a batch of 256; the run's is this times batch_size / 256", _POSITIVE),
    "adam_b2": Field(0.999, "AdamW's second decay", _BELOW_ONE),
}

# Encoder and image size are those of `init` where it is a directory; the classes are those of the data's boxes.
DETECT = {
    "seed": Field(0, "root of every random number of the run", _SEED),
    "objective": Field(
        "dense",
        "the detector: dense (at every cell, as FCOS), detr (queries, as DETR)",
        DETECTORS,
    ),
    "init": Field("", "a run or ported checkpoint (directory) whose encoder is taken, or random"),
    **{name: field for name, field in _DATA.items() if not name.startswith(("data.device_cache", "data.cache_"))},
    "data.source": Field(
        "scenes", "images with boxes: coco:IMAGES_DIR,ANNOTATIONS.json[,...], tfds:coco/2017 or scenes"
    ),
    "data.split": Field("train", "the split trained on"),
    "data.eval_split": Field("val", "the split that AP is of; empty: none"),
    "data.max_boxes": Field(100, "boxes an image in training, the largest ones of an image that has more", _POSITIVE),
    "data.jitter": Field((0.8, 1.25), "images are scaled by a number of this range, then cropped or padded", _RANGE),
    "data.flip": Field(True, "mirror half of the images"),
    "image_size": Field(0, "pixels a side; 0: as the encoder was trained", _at_least(0)),
    "batch_size": Field(16, "examples a step, over all devices", _POSITIVE),
    **{name: PRETRAIN[name] for name in _RUN if name not in (*_CROPS, "bn_groups")},
    **_ENCODER,
    "encoder.name": Field("", "the encoder of init random; a directory brings its own"),
    "encoder.stride": Field(0, "pixels a cell, where the encoder leaves a choice; 0: as it was trained", _at_least(0)),
    **_PIXELS,
    "tune": Field(False, "train the encoder too; its batch norm stays frozen"),
    "encoder_rate": Field(0.1, "with tune, the encoder's learning rate is the detector's times this", _POSITIVE),
    "detector.classes": Field(0, "set from the data", _at_least(0)),
    "detector.stages": Field(
        False, "give the detector the encoder's maps of finer strides too, not the last one alone"
    ),
    "detector.count": Field(100, "detections an image, at most", _POSITIVE),
    "dense.strides": Field((8, 16, 32), "pixels a cell of its levels, each twice the one before", _COUNTS),
    "dense.width": Field(128, "its channels, a multiple of 8", _POSITIVE),
    "dense.depth": Field(2, "convolutions of its towers", _at_least(0)),
    "detr.size": Field("small", "width 128 and 3 layers, or width 256 and 6", ("small", "base")),
    "detr.queries": Field(100, "boxes that it can see in an image, data.max_boxes or more", _POSITIVE),
    "detr.anchors": Field(True, "queries are boxes that the layers refine; converges far sooner than learnt queries"),
    "detr.groups": Field(
        4, "sets of queries that learn side by side, of which the first is asked afterwards", _POSITIVE
    ),
    "learning_rate": Field(1e-3, "peak rate for a batch of 256; the run's is this times batch_size / 256", _POSITIVE),
    "adam_b2": Field(0.999, "AdamW's second decay", _BELOW_ONE),
}

# A ported checkpoint's: a model, and nothing of how it was trained.
CLASSIFIER = {
    "objective": Field("classifier", "an encoder and, where it has classes, its head", ("classifier",)),
    **_ENCODER,
    **_PIXELS,
    "image_size": Field(224, "pixels a side of the images it was made for", _POSITIVE),
    "head.classes": Field(0, "of its classifier; 0: it has none", _at_least(0)),
}


def load(path, overrides=(), fields=PRETRAIN):
    """Config file and `(key, text)` overrides from the command line -> a checked, locked ConfigDict."""
    return resolve(merge(flatten(read(path)), parse(overrides, fields), fields), fields)


def parse(overrides, fields=PRETRAIN):
    """`(key, text)` pairs -> {key: value of the field's type}."""
    return {key: _parse(text, _lookup(key, fields)[0]) for key, text in overrides}


def merge(given, more, fields=PRETRAIN):
    """{dotted key: value} of `more` over those of `given`, which gives way where it says the same in another unit."""
    rivals = set()
    for key, value in more.items():
        _, base = _lookup(key, fields)
        if fields[base].duration:
            rivals |= {base, *(f"{base}_{unit}" for unit in UNITS)}
        if key in _LENGTHS and value is not None:
            rivals |= set(_LENGTHS)
    return {key: value for key, value in given.items() if key not in rivals} | more


def resolve(given, fields=PRETRAIN):
    """{dotted key: value} over the defaults -> a checked, locked ConfigDict."""
    values = {key: field.default for key, field in fields.items()}
    durations = {}
    for key, value in given.items():
        field, base = _lookup(key, fields)
        values[key] = _check(key, value, field)
        if durations.setdefault(base, key) != key:
            raise UserError(
                f"config fields {durations[base]} and {key} are both set: they are one duration, set one of them"
            )
        if key != base:
            del values[base]
    if any(fields is table for table in (PRETRAIN, FINETUNE, DETECT)):
        _check_run(values)
    if fields is PRETRAIN:
        _check_decoder(values)
    elif fields is PROBE:
        _check_probe(values)
    config = ml_collections.ConfigDict(type_safe=False)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict(type_safe=False)
            node = node[parent]
        node[leaf] = value
    return config.lock()


def flatten(config, prefix=""):
    """Nested dict or ConfigDict -> {dotted key: value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (dict, ml_collections.ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def table(given):
    """The fields that {dotted key: value} are of: those of a run, a fine-tuned one, a detector or a ported checkpoint."""
    known = {"classifier": CLASSIFIER, "finetune": FINETUNE, **dict.fromkeys(DETECTORS, DETECT)}
    return known.get(given.get("objective"), PRETRAIN)


def to_json(config):
    """A text that `from_json` reads back to an equal config."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text, fields=None):
    """The config of a text; without `fields` that of a run or, where it says so, of a ported checkpoint."""
    try:
        given = flatten(json.loads(text))
        return resolve(given, fields or table(given))
    except (ValueError, AttributeError) as error:
        raise UserError(f"config.json is not a config: {error}") from error


def differing(saved, config, fields=None):
    """Where a saved config differs from another in more than how it is watched -> [(key, saved, now), ...].

    Both are configs or dicts. A duration counts by the unit it is given in: None stands for one that is in another.
    """
    # Both as JSON gives them back: a saved list was a tuple.
    dicts = (given if isinstance(given, dict) else given.to_dict() for given in (saved, config))
    old, new = (flatten(json.loads(json.dumps(given))) for given in dicts)
    fields = fields or table(new)
    old, new = (_completed(given, fields) for given in (old, new))
    keys = [key for key in {**new, **old} if not key.startswith(RESUMABLE)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _completed(given, fields):
    """{dotted key: value} in the table's order, with the defaults of fields that are newer than what was saved."""
    values = {}
    for name, field in fields.items():
        spelt = (name, *(f"{name}_{unit}" for unit in UNITS)) if field.duration else (name,)
        values |= {key: given[key] for key in spelt if key in given} or {name: json.loads(json.dumps(field.default))}
    return values


def read(path):
    """What get_config() of a python file returns, as a dict. Raises UserError, whatever is wrong with the file."""
    if not os.path.isfile(path):
        raise UserError(f"--config {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("_qbheat_config", path)
    if spec is None:
        raise UserError(f"--config {path}: a python file with get_config() is needed")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
        return config if isinstance(config, dict) else config.to_dict()
    except (Exception, SystemExit) as error:  # whatever a config file may do wrong, it is the file that is at fault
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error


def _lookup(key, fields):
    """-> (field, name of the field in the table); raises UserError, with the likeliest name, where there is none."""
    if key in fields:
        return fields[key], key
    key = str(key)
    inside = [field for field in fields if field.startswith(f"{key}.")]
    if inside:
        raise UserError(f"config field {key} is a section, not a value: set {', '.join(inside)}")
    base, _, unit = key.rpartition("_")
    if unit in UNITS and base in fields and fields[base].duration:
        return Field(0.0, "", _at_least(0), float), base
    near = difflib.get_close_matches(key, fields, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(fields)}"
    raise UserError(f"config field {key} is unknown{hint}")


def _parse(text, field):
    if (field.type or type(field.default)) is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _fail(key, value, accepted):
    raise UserError(f"config field {key}={value!r} is not accepted: it takes {accepted}")


def _float(number):
    """The float, infinite where an int is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _check(key, value, field):
    """The value, of the field's type, or a UserError."""
    kind = field.type or type(field.default)
    if value is None and field.default is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _float(value)
    if kind is tuple and isinstance(value, (list, tuple)):
        numbers = [_float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in value]
        if not all(map(math.isfinite, numbers)):
            _fail(key, value, "numbers")
        value = tuple(numbers)
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "a list of numbers"}[
        kind
    ]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        _fail(key, value, words)
    if isinstance(field.accept, tuple) and callable(field.accept[0]):
        if not field.accept[0](value):
            _fail(key, value, field.accept[1])
    elif field.accept and value not in field.accept:
        _fail(key, value, "one of " + ", ".join(map(repr, field.accept)))
    return value


def _check_run(values):
    """Combinations in the config of a training run that cannot be, found without building anything."""
    steps, epochs = values["total_steps"], values["total_epochs"]
    if (steps is None) == (epochs is None):
        raise UserError(f"config fields total_steps={steps} and total_epochs={epochs}: exactly one of them must be set")
    first, *others = [axis for axis in ("mesh.data", "mesh.fsdp", "mesh.model") if values[axis] == -1] or [None]
    if others:
        _fail(others[0], -1, f"a number of devices when {first} is -1: only one axis can take all that are left")
    accumulate, groups = values["accumulate"], values.get("bn_groups", 1)
    if accumulate > 1 and values["objective"] == "moco":
        _fail("accumulate", accumulate, "1 with objective='moco', whose key encoder follows once a step")
    if values["batch_size"] % (accumulate * groups):
        _fail("batch_size", values["batch_size"], f"a multiple of accumulate={accumulate} times bn_groups={groups}")


def _check_decoder(values):
    decodes = values["objective"] in ("qbheat", "mae")
    if decodes and (values["decoder.width"] % values["decoder.heads"] or values["decoder.width"] % 4):
        _fail(
            "decoder.width", values["decoder.width"], f"a multiple of 4 and of decoder.heads={values['decoder.heads']}"
        )


def _check_probe(values):
    if values["protocol"] == "knn":
        if values["augment"]:
            _fail("augment", True, "False with protocol='knn', which asks for the neighbours of the images as they are")
    elif values["optimizer"] == "ridge":
        if values["protocol"] != "lin":
            _fail("optimizer", "ridge", f"sgd, lars or adamw where protocol is {values['protocol']!r}")
        if values["augment"]:
            _fail("augment", True, "False with optimizer='ridge', which needs all features at once")
        if min(values["weight_decays"]) <= 0:
            _fail("weight_decays", values["weight_decays"], "numbers above 0 with optimizer='ridge'")
