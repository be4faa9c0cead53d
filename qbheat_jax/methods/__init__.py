"""Training objectives: one file a method, one line of METHODS, built from a config by `build`. See `base.Method`."""

import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.methods.base import Schedule
from qbheat_jax.methods.classifier import Classifier
from qbheat_jax.methods.dense import Dense
from qbheat_jax.methods.detr import Detr
from qbheat_jax.methods.dino import DINO
from qbheat_jax.methods.finetune import Finetune
from qbheat_jax.methods.finola import Finola
from qbheat_jax.methods.ijepa import IJEPA
from qbheat_jax.methods.lejepa import LeJEPA
from qbheat_jax.methods.mae import MAE
from qbheat_jax.methods.moco import MoCo
from qbheat_jax.methods.qbheat import QBHeat
from qbheat_jax.methods.simclr import SimCLR
from qbheat_jax.methods.simmim import SimMIM
from qbheat_jax.methods.supervised import Supervised
from qbheat_jax.methods.vicreg import VICReg
from qbheat_jax.models import registry
from qbheat_jax.models.fields import OPTIONS
from qbheat_jax.models.ghost_batch_norm import grouped

METHODS = {
    method.NAME: method
    for method in (
        QBHeat,
        MoCo,
        MAE,
        SimMIM,
        Finola,
        SimCLR,
        VICReg,
        DINO,
        IJEPA,
        LeJEPA,
        Supervised,
        Finetune,
        Dense,
        Detr,
        Classifier,
    )
}

OURS = QBHeat.NAME  # what the others are compared with


def names(task):
    """Return the names of a task's methods, its default first."""
    return tuple(name for name, method in METHODS.items() if method.TASK == task)


def described(task):
    """Return the names of a task's methods with their notes, as text."""
    notes = {name: METHODS[name].NOTE for name in names(task)}
    return ", ".join(f"{name} ({note})" if note else name for name, note in notes.items())


def fields(task):
    """Return {dotted key: Field} of a task's methods together, in the order of METHODS."""
    found = {}
    for name in names(task):
        for key, field in METHODS[name].FIELDS.items():
            if found.setdefault(key, field) is not field:
                raise ValueError(f"methods declare different fields {key}, {name} among them")
    return found


def of(config):
    """Return the class of a config's method."""
    return METHODS[config.objective]


def check(values):
    """Raise UserError for {dotted key: value} that their own method does not take together."""
    METHODS[values["objective"]].check(values)


def batch_spec(config):
    """Return the data spec of a run's training batches."""
    return of(config).batch_spec(config)


def build_encoder(config):
    """Return the encoder of any config with `encoder` fields. Raises UserError where they do not go together."""
    fields = config.encoder
    # Only some encoders have an option, so the others are not given its default.
    options = {name: fields[name] for name, default in OPTIONS.items() if fields[name] != default}
    options["remat"] = config.get("remat", "none")  # a probe's or a ported checkpoint's config has none
    encoder = registry.encoder(
        fields.name, stride=fields.stride, drop_path=fields.drop_path, dtype=config.dtype, **options
    )
    return encoder.for_images(config.image_size)


def build(config, schedule=Schedule()):
    """Return the method of a run's or a ported checkpoint's config, with its encoder.

    Args:
      config: Checked config.
      schedule: Length of the run, see `optim.run_schedule`; by default not known.

    Raises UserError where fields do not go together.
    """
    encoder = build_encoder(config)
    check_size(config.image_size, config.encoder.name, encoder)
    if encoder.takes_clips and not of(config).takes_clips:
        able = ", ".join(name for name in names(of(config).TASK) if METHODS[name].takes_clips)
        raise UserError(
            f"config field objective={config.objective!r} is not accepted: encoder.name={config.encoder.name!r} takes clips, "
            f"which {able or 'no method of this task'} can train on"
        )
    if encoder.has_batch_norm:
        encoder = grouped(encoder, config.get("bn_groups", 1))
    return of(config).build(config, encoder, schedule)


def forward(method, variables, images):
    """Return the logits float32 [B, classes] of images uint8 [B, H, W, 3], or their features float32 without a classifier."""
    pixels = method.pixels.normalise(images)
    if getattr(method, "head", None) is not None:
        return method.logits(variables, pixels)
    encoder = {collection: tree["encoder"] for collection, tree in variables.items() if "encoder" in tree}
    return method.encoder.apply(encoder, pixels)[0].astype(jnp.float32)


def check_size(size, name, encoder):
    """Raise UserError where images of `size` pixels a side are no whole cells of the encoder with that name."""
    if size % encoder.stride:
        raise UserError(
            f"config field image_size={size} is not accepted: {name} takes a multiple of its stride, {encoder.stride}"
        )
