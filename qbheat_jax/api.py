"""A trained run as an object: `qbheat_jax.load(dir)`."""

import functools

import jax
import jax.numpy as jnp
from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax import images as images_lib
from qbheat_jax import objectives
from qbheat_jax.checkpoint import Checkpoints
from qbheat_jax.errors import UserError


class Model:
    """An encoder and its heat decoder with the weights of a run.

    config: the run's config. variables: {"params": {"encoder", "decoder"}, "batch_stats": {"encoder"}}, numpy arrays, the
    averaged parameters where the run kept an average. step: the checkpoint's.
    """

    def __init__(self, config, variables, step):
        self.config, self.variables, self.step = config, variables, step
        self.objective = objectives.build(config)

    @property
    def encoder(self):
        return self.objective.encoder

    @property
    def encoder_variables(self):
        """What `encoder.apply` takes."""
        return {collection: tree["encoder"] for collection, tree in self.variables.items() if "encoder" in tree}

    def features(self, images, *, normalized=False):
        """Feature maps of whole images: uint8 [B, H, W, 3] (or normalised floats) -> float32 [B, H / s, W / s, C]."""
        images = jnp.asarray(images) if normalized else images_lib.normalise(_checked(images))
        return self._features(self.encoder_variables, images)

    def reconstruct(self, images, quarter):
        """Images with the three masked quarters predicted: uint8 [B, H, W, 3], quarter int [B] or one -> uint8 [B, H, W, 3]."""
        images = _checked(images)
        quarter = jnp.broadcast_to(jnp.asarray(quarter, jnp.int32), images.shape[:1])
        allowed = self.objective.decoder.placements
        wrong = sorted(set(quarter.tolist()) - set(allowed))
        if wrong:
            raise UserError(f"placement {wrong[0]} was not trained on: this run takes {', '.join(map(str, allowed))}")
        return self._reconstruct(self.variables, images, quarter)

    @functools.cached_property
    def _features(self):
        return jax.jit(lambda variables, images: self.encoder.apply(variables, images)[0].astype(jnp.float32))

    @functools.cached_property
    def _reconstruct(self):
        return jax.jit(self.objective.reconstruct)


def _checked(images):
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise UserError(f"images are {images.dtype}{list(images.shape)}: uint8 [B, H, W, 3] is needed")
    return images


def load(directory):
    """The run in a workdir, at its newest whole checkpoint -> Model. Raises UserError where there is none."""
    directory = epath.Path(directory)
    if not (directory / "config.json").exists():
        raise UserError(f"{directory} holds no run: there is no config.json in it")
    try:
        config = config_lib.from_json((directory / "config.json").read_text())
    except UserError as error:
        raise UserError(f"{directory} holds no run that can be read: {error}") from error
    step, variables = Checkpoints(directory).restore_variables()
    return Model(config, variables, step)
