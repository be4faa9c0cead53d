"""Tables of config fields for pre-training, fine-tuning, detection and ported weights.

Each field comes from its owner in data/, models/, methods/ or train/. The tables put them in the order of config.json.
"""

import dataclasses

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.config import POSITIVE, POSITIVE_FRACTION, SEED, Field, Table, at_least
from qbheat_jax.data.fields import CACHE, DATA, FEW_SHOT, SPLIT
from qbheat_jax.data.specs import clips, image
from qbheat_jax.methods import base
from qbheat_jax.models.fields import ENCODER, PIXELS
from qbheat_jax.train import fields

_SEED = {"seed": Field(0, "root of every random number of the run", SEED)}
# Fields whose default comes from --init.
_BROUGHT = {
    "image_size": Field(0, "pixels a side; 0: as the encoder was trained", at_least(0)),
    "encoder.name": Field("", "the encoder of init random; a directory brings its own"),
}


def _objective(task, doc):
    names = methods.names(task)
    return {"objective": Field(names[0], doc, names)}


def _without(fields, *names):
    return {key: field for key, field in fields.items() if key not in names}


def pretrain():
    """Return the table of pre-training, with the fields of every pre-training method."""
    return Table(
        {
            **_SEED,
            **_objective(base.PRETRAIN, f"the pre-training method: {methods.described(base.PRETRAIN)}"),
            "init": Field(
                "", "start from the encoder of a run or ported checkpoint (directory); empty: from random weights"
            ),
            **DATA,
            **SPLIT,
            "data.eval_split": Field("val", "the split whose loss is reported every eval_every steps; empty: none"),
            **image.FIELDS,
            **clips.OWN,
            "image_size": Field(256, "pixels a side of the images trained on", POSITIVE),
            "batch_size": Field(1024, "examples a step, over all devices", POSITIVE),
            **fields.LENGTH,
            **ENCODER,
            **PIXELS,
            **methods.fields(base.PRETRAIN),
            **fields.learning_rate(1.5e-4),
            **fields.LOOP,
            **fields.MONITORS,
            **fields.ONLINE,
        },
        fields.check,
        methods.check,
    )


def finetune():
    """Return the table of fine-tuning.

    Encoder and image size are those of `init` where it is a directory; the number of classes is the data's.
    """
    return Table(
        {
            **_SEED,
            **_objective(base.FINETUNE, "a classifier, trained from end to end"),
            "init": Field("", "start from the encoder of a run or ported checkpoint (directory), or random"),
            **DATA,
            "data.source": Field("", "labelled images; empty: those the encoder was trained on"),
            **SPLIT,
            "data.eval_split": Field(
                "val",
                "the split measured every eval_every steps, unless it is the test split; empty: none",
            ),
            **FEW_SHOT,
            "image_size": _BROUGHT["image_size"],
            "batch_size": Field(256, "examples a step, over all devices", POSITIVE),
            **fields.LENGTH,
            **image.FIELDS,
            **clips.OWN,
            **_without(fields.LOOP, "images_every"),
            **ENCODER,
            "encoder.name": _BROUGHT["encoder.name"],
            "encoder.drop_path": dataclasses.replace(
                ENCODER["encoder.drop_path"],
                default=0.1,
                doc="stochastic depth rate; replaces that of init's own training",
            ),
            **PIXELS,
            **methods.fields(base.FINETUNE),
            "layer_decay": Field(
                0.75,
                "layer-wise decay: learning rate of a layer over that of the next one, towards the output",
                POSITIVE_FRACTION,
            ),
            **fields.learning_rate(5e-4),
            "adam_b2": dataclasses.replace(fields.LOOP["adam_b2"], default=0.999),
        },
        fields.check,
        methods.check,
    )


def detect():
    """Return the table of detection.

    Encoder and image size are those of `init` where it is a directory; the classes are those of the data's boxes.
    """
    return Table(
        {
            **_SEED,
            **_objective(base.DETECT, f"the detector: {methods.described(base.DETECT)}"),
            "init": Field("", "use the encoder of a run or ported checkpoint (directory), or random"),
            **_without(DATA, *CACHE),
            "data.source": Field(
                "scenes", "images with boxes: coco:IMAGES_DIR,ANNOTATIONS.json[,...], tfds:coco/2017 or scenes"
            ),
            **SPLIT,
            "data.eval_split": Field("val", "the split that AP, or the method's own metric, is of; empty: none"),
            "image_size": _BROUGHT["image_size"],
            "batch_size": Field(16, "examples a step, over all devices", POSITIVE),
            **fields.LENGTH,
            **_without(fields.LOOP, "images_every", "bn_groups"),
            **ENCODER,
            "encoder.name": _BROUGHT["encoder.name"],
            "encoder.stride": Field(
                0, "pixels a cell, where the encoder leaves a choice; 0: as it was trained", at_least(0)
            ),
            **PIXELS,
            "tune": Field(False, "train the encoder too; its batch norm stays frozen"),
            "encoder_rate": Field(0.1, "with tune, the encoder's learning rate is the detector's times this", POSITIVE),
            "detector.classes": Field(0, "set from the data", at_least(0)),
            **methods.fields(base.DETECT),
            **fields.learning_rate(1e-3),
            "adam_b2": dataclasses.replace(fields.LOOP["adam_b2"], default=0.999),
        },
        fields.check,
        methods.check,
    )


def classifier():
    """Return the table of a ported checkpoint: the model's fields, without those of training."""
    return Table(
        {
            **_objective(base.PORTED, "an encoder and, where it has classes, its head"),
            **ENCODER,
            **PIXELS,
            "image_size": Field(224, "pixels a side of the images it was made for", POSITIVE),
            **methods.fields(base.PORTED),
        },
        methods.check,
    )


PRETRAIN, FINETUNE, DETECT, CLASSIFIER = pretrain(), finetune(), detect(), classifier()
_BY_TASK = {base.PRETRAIN: PRETRAIN, base.FINETUNE: FINETUNE, base.DETECT: DETECT, base.PORTED: CLASSIFIER}


def of(given):
    """Return the table that {dotted key: value}, or a config, belongs to: that of its objective's task, else PRETRAIN."""
    method = methods.METHODS.get(given.get("objective"))
    return PRETRAIN if method is None else _BY_TASK[method.TASK]


def resolve(given):
    """Return the checked config of {dotted key: value}. Its objective determines the table."""
    return config_lib.resolve(given, of(given))


def from_json(text):
    """Return the config of the config.json of a workdir."""
    return config_lib.from_json(text, of)
