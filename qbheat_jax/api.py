"""Load a trained run or a ported checkpoint as an object: `qbheat_jax.load(dir)`."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from qbheat_jax import config as config_lib
from qbheat_jax import methods, paths
from qbheat_jax.data import labels
from qbheat_jax.errors import UserError
from qbheat_jax.models.encoder import Resized
from qbheat_jax.ops import quarters
from qbheat_jax.train import config_tables
from qbheat_jax.train.checkpoint import Checkpoints

log = logging.getLogger("qbheat")


class Model:
    """An encoder with trained weights, and the decoder, head or detector trained with it.

    Attributes:
      config: The run's.
      variables: {"params": {"encoder", "decoder" or "head" or ...}, "batch_stats": ...}, arrays; the averaged parameters
        where the run kept an average.
      step: The checkpoint's.
      classes: [(key, name), ...] of the classifier's outputs, or None.
      objective: The method that it was trained by.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        step: int,
        classes: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self.config, self.variables, self.step, self.classes = config, variables, step, classes
        self.objective = methods.build(config)

    @property
    def encoder(self) -> nn.Module:
        return self.objective.encoder

    @property
    def encoder_variables(self) -> dict[str, Any]:
        """The variables that `encoder.apply` takes."""
        return {collection: tree["encoder"] for collection, tree in self.variables.items() if "encoder" in tree}

    @property
    def class_names(self) -> list[str] | None:
        return None if self.classes is None else [name for _, name in self.classes]

    def sized(self, image_size: int) -> "Model":
        """Return the same model for square images of another size. Log what the encoder resampled for it."""
        return self._changed(self.encoder.resize(self.variables["params"]["encoder"], image_size), image_size)

    def folded(self, image_size: int = 0) -> "Model":
        """Return the same model for inference on square images of one size, 0: the config's, with less to compute.

        Raises:
          UserError: The encoder has no such form.
        """
        size = image_size or self.config.image_size
        if self.encoder.fold is None:
            raise UserError(f"encoder {self.config.encoder.name} has no folded form")
        methods.check_size(size, self.config.encoder.name, self.encoder)
        return self._changed(self.encoder.fold(self.variables["params"]["encoder"], size), size)

    def _changed(self, encoder: Resized, image_size: int) -> "Model":
        if encoder.notice:
            log.info("%s", encoder.notice)
        fields = {**config_lib.flatten(self.config.to_dict()), "image_size": image_size}
        fields |= {f"encoder.{name}": value for name, value in encoder.options.items()}
        params = {**self.variables["params"], "encoder": encoder.params}
        return Model(config_tables.resolve(fields), {**self.variables, "params": params}, self.step, self.classes)

    def anywhere(self) -> "Model":
        """Return the same run with a decoder that takes every placement that splits its images' cells.

        Every set of placements trains all four directions, over any distance. The decoder's blocks were not trained on
        the placements that this adds.
        """
        fits = "corners" if self.config.image_size // self.encoder.stride % 4 else "all9"
        made = Model(self.config, self.variables, self.step, self.classes)
        decoder = made.objective.decoder.clone(placements=quarters.PLACEMENT_SETS[fits])
        made.objective = dataclasses.replace(made.objective, decoder=decoder)
        return made

    def features(self, images: ArrayLike, *, normalized: bool = False) -> jax.Array:
        """Return feature maps float32 [B, H / stride, W / stride, C] of images uint8 [B, H, W, 3].

        An encoder of clips takes uint8 [B, 2, T, H, W, 3] instead, RGB frames and event frames; so do the methods below.

        normalized: The images are normalised floats.
        """
        return self._features(self.encoder_variables, self._pixels(images, normalized))

    def logits(self, images: ArrayLike, *, normalized: bool = False) -> jax.Array:
        """Return the classifier's outputs float32 [B, classes] of images uint8 [B, H, W, 3].

        normalized: The images are normalised floats.
        """
        if getattr(self.objective, "head", None) is None:
            raise UserError(
                f"this {self.config.encoder.name} has no classifier: port a checkpoint with its head, or train one "
                "with qbheat probe"
            )
        return self._logits(self.variables, self._pixels(images, normalized))

    def reconstruct(
        self,
        images: ArrayLike,
        quarter: ArrayLike | None = None,
        *,
        blend: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> jax.Array:
        """Return images uint8 [B, H, W, 3] with the three masked quarters predicted, or whole images decoded.

        Args:
          images: uint8 [B, H, W, 3].
          quarter: Placement of the visible quarter, int [B] or one for all; one of those trained on. None for a method that
            decodes whole images.
          blend: Shift predictions to meet the visible pixels.
          variables: Used instead of the model's own; of the same shapes.

        Raises:
          UserError: the model does not reconstruct, takes no placement or needs one, or was not trained on it.
        """
        what = self.objective.reconstructs
        if not what:
            able = " or ".join(repr(name) for name, method in methods.METHODS.items() if method.reconstructs)
            raise UserError(
                f"this {self.config.encoder.name} has no decoder of images: only a run of objective={able} reconstructs"
            )
        images = self._checked(images)
        if (quarter is not None) != (what == "quarters"):
            needed = (
                "a placement of the visible quarter" if what == "quarters" else "no placement: it sees whole images"
            )
            raise UserError(f"quarter={quarter!r} is not accepted: a run of {self.objective.NAME} takes {needed}")
        if what == "images":
            return self._reconstruct(variables or self.variables, images)
        quarter = jnp.broadcast_to(jnp.asarray(quarter, jnp.int32), images.shape[:1])
        allowed = self.objective.decoder.placements
        wrong = sorted(set(quarter.tolist()) - set(allowed))
        if wrong:
            raise UserError(f"placement {wrong[0]} was not trained on: this run takes {', '.join(map(str, allowed))}")
        return self._reconstruct(variables or self.variables, images, quarter, blend)

    def _pixels(self, images: ArrayLike, normalized: bool) -> jax.Array:
        return jnp.asarray(images) if normalized else self.objective.pixels.normalise(self._checked(images))

    def _checked(self, images: ArrayLike) -> jax.Array:
        images, shape = jnp.asarray(images), "[B, 2, T, H, W, 3]" if self.encoder.takes_clips else "[B, H, W, 3]"
        if images.ndim != shape.count(",") + 1 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise UserError(f"images are {images.dtype}{list(images.shape)}: uint8 {shape} is needed")
        return images

    @functools.cached_property
    def _features(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda variables, images: self.encoder.apply(variables, images)[0].astype(jnp.float32))

    @functools.cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        return jax.jit(self.objective.logits)

    @functools.cached_property
    def _reconstruct(self) -> Callable[..., jax.Array]:
        return jax.jit(self.objective.reconstruct)


def read_config(directory: str | os.PathLike[str]) -> ConfigDict:
    """Return the config of a workdir.

    Raises:
      UserError: There is none that can be read, or its checkpoints were made with another.
    """
    with _opened(directory) as (config, _):
        return config


def load(directory: str | os.PathLike[str]) -> Model:
    """Return the `Model` of a run or ported checkpoint, at its newest whole checkpoint.

    Raises:
      UserError: As `read_config`, or there is no checkpoint that can be read.
    """
    with _opened(directory) as (config, saved):
        if saved is None:
            raise UserError(f"{directory} has no checkpoints: there is nothing to load")
        step, variables = saved.restore_variables()
    return Model(config, variables, step, labels.read(paths.expand(directory)))


@contextlib.contextmanager
def _opened(directory: str | os.PathLike[str]) -> Iterator[tuple[ConfigDict, Checkpoints | None]]:
    """Yield (the config, the open `Checkpoints` or None) of a workdir. Raise UserError as `read_config` does."""
    folder = epath.Path(paths.expand(directory, "a run's directory"))
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no run: there is no config.json in it")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} holds no run that can be read: config.json is no text file") from error
    saved = Checkpoints(folder) if (folder / "checkpoints").exists() else None
    try:
        if saved is not None:
            _check_same(folder, text, saved)
        try:
            config = config_tables.from_json(text)
        except UserError as error:
            raise UserError(f"{folder} holds no run that can be read: {error}") from error
        yield config, saved
    finally:
        if saved is not None:
            saved.close()


def _check_same(directory: epath.Path, text: str, saved: Checkpoints) -> None:
    """Raise UserError where config.json is not the newest checkpoint's, in more than how a run is watched."""
    steps, carried = saved.steps(), saved.config()
    if not steps:
        return
    if not carried:
        raise UserError(f"{directory}: its checkpoints {steps} have lost their config, or it is damaged")
    try:
        differ = config_lib.differing(carried, json.loads(text), config_tables.of)
    except (ValueError, AttributeError):  # no JSON, or no dict: `from_json` reports it
        return
    if differ:
        key, old, new = differ[0]
        more = f" ({len(differ) - 1} more fields differ)" if differ[1:] else ""
        raise UserError(
            f"{directory}: config.json has {key}={new!r}, but its checkpoint was made with {key}={old!r}{more}: restore "
            "the old value"
        )
