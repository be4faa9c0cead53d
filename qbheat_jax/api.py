"""A trained run or a ported checkpoint as an object: `qbheat_jax.load(dir)`."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax import methods, paths
from qbheat_jax.data import labels
from qbheat_jax.errors import UserError
from qbheat_jax.ops import quarters
from qbheat_jax.train.checkpoint import Checkpoints

log = logging.getLogger("qbheat")


class Model:
    """An encoder with the weights of a run or of a ported checkpoint, and what its objective trained beside it.

    config: the run's. variables: {"params": {"encoder", "decoder" or "head" or ...}, "batch_stats": ...}, numpy arrays, the
    averaged parameters where the run kept an average. step: the checkpoint's. class_names: of the classifier's
    outputs, or None.
    """

    def __init__(self, config, variables, step, classes=None):
        self.config, self.variables, self.step, self.classes = config, variables, step, classes
        self.objective = methods.build(config)

    @property
    def encoder(self):
        return self.objective.encoder

    @property
    def encoder_variables(self):
        """What `encoder.apply` takes."""
        return {collection: tree["encoder"] for collection, tree in self.variables.items() if "encoder" in tree}

    @property
    def class_names(self):
        return None if self.classes is None else [name for _, name in self.classes]

    def sized(self, image_size):
        """Return the same model for square images of another size. Log what the encoder resampled for it."""
        params = self.variables["params"]
        encoder = self.encoder.resize(params["encoder"], image_size)
        if encoder.notice:
            log.info("%s", encoder.notice)
        fields = {**config_lib.flatten(self.config.to_dict()), "image_size": image_size}
        fields |= {f"encoder.{name}": value for name, value in encoder.options.items()}
        sized = config_lib.resolve(fields, config_lib.table(fields))
        params = {**params, "encoder": encoder.params}
        return Model(sized, {**self.variables, "params": params}, self.step, self.classes)

    def anywhere(self):
        """The same run, with a decoder that takes every placement of which its images' cells can be split.

        Each set of placements trains all four directions, and a direction's map is known over any distance; but what the
        decoder's blocks make of a placement that was not trained on, nothing asked for.
        """
        fits = "corners" if self.config.image_size // self.encoder.stride % 4 else "all9"
        made = Model(self.config, self.variables, self.step, self.classes)
        decoder = made.objective.decoder.clone(placements=quarters.PLACEMENT_SETS[fits])
        made.objective = dataclasses.replace(made.objective, decoder=decoder)
        return made

    def features(self, images, *, normalized=False):
        """Feature maps of whole images: uint8 [B, H, W, 3] (or normalised floats) -> float32 [B, H / s, W / s, C]."""
        return self._features(self.encoder_variables, self._pixels(images, normalized))

    def logits(self, images, *, normalized=False):
        """The classifier's outputs: uint8 [B, H, W, 3] (or normalised floats) -> float32 [B, classes]."""
        if getattr(self.objective, "head", None) is None:
            raise UserError(
                f"this {self.config.encoder.name} has no classifier: port a checkpoint with its head, or train one "
                "with qbheat probe"
            )
        return self._logits(self.variables, self._pixels(images, normalized))

    def reconstruct(self, images, quarter, *, blend=True, variables=None):
        """Images with the three masked quarters predicted: uint8 [B, H, W, 3], quarter int [B] or one -> uint8 [B, H, W, 3].

        `blend`: what is predicted is raised or lowered to meet the visible pixels; without it, it is as the decoder left it.
        `variables`: of the same shapes, in the place of the model's own.
        """
        if not hasattr(self.objective, "reconstruct"):
            raise UserError(
                f"this {self.config.encoder.name} has no heat decoder: only a run of objective='qbheat' reconstructs"
            )
        images = _checked(images)
        quarter = jnp.broadcast_to(jnp.asarray(quarter, jnp.int32), images.shape[:1])
        allowed = self.objective.decoder.placements
        wrong = sorted(set(quarter.tolist()) - set(allowed))
        if wrong:
            raise UserError(f"placement {wrong[0]} was not trained on: this run takes {', '.join(map(str, allowed))}")
        return self._reconstruct(variables or self.variables, images, quarter, blend)

    def _pixels(self, images, normalized):
        return jnp.asarray(images) if normalized else self.objective.pixels.normalise(_checked(images))

    @functools.cached_property
    def _features(self):
        return jax.jit(lambda variables, images: self.encoder.apply(variables, images)[0].astype(jnp.float32))

    @functools.cached_property
    def _logits(self):
        return jax.jit(self.objective.logits)

    @functools.cached_property
    def _reconstruct(self):
        return jax.jit(self.objective.reconstruct)


def _checked(images):
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise UserError(f"images are {images.dtype}{list(images.shape)}: uint8 [B, H, W, 3] is needed")
    return images


def read_config(directory):
    """The config of a workdir. UserError where none can be read, or where its checkpoints are of another."""
    directory = paths.expand(directory, "a run's directory")
    path = epath.Path(directory) / "config.json"
    if not path.exists():
        raise UserError(f"{directory} holds no run: there is no config.json in it")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{directory} holds no run that can be read: config.json is no text file") from error
    _check_carried(directory, text)
    try:
        return config_lib.from_json(text)
    except UserError as error:
        raise UserError(f"{directory} holds no run that can be read: {error}") from error


def _check_carried(directory, text):
    """UserError where a config.json is not what the newest checkpoint carries, in more than how a run is watched."""
    if not (epath.Path(directory) / "checkpoints").exists():
        return
    saved = Checkpoints(directory)
    try:
        steps, carried = saved.steps(), saved.config()
    finally:
        saved.close()
    if not steps:
        return
    if not carried:
        raise UserError(
            f"{directory}: none of its checkpoints {steps} says of what config it is: its config is lost or damaged"
        )
    try:
        differ = config_lib.differing(carried, json.loads(text))
    except (ValueError, AttributeError):  # no JSON, or no dict: `from_json` says so
        return
    if differ:
        key, old, new = differ[0]
        more = f" ({len(differ) - 1} more fields differ)" if differ[1:] else ""
        raise UserError(
            f"{directory}: config.json says {key}={new!r}, and its checkpoint was made with {key}={old!r}{more}: put that "
            "back"
        )


def load(directory):
    """The run or ported checkpoint in a workdir, at its newest whole checkpoint -> Model. UserError where there is none."""
    config, directory = read_config(directory), paths.expand(directory)
    step, variables = Checkpoints(directory).restore_variables()
    return Model(config, variables, step, labels.read(directory))
