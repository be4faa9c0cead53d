"""Resolve --init, the weights that a command starts from. This is the only module that accepts or refuses it.

An init is the directory of a run or of a ported checkpoint, `random` (an untrained encoder), or one of NO_ENCODER
(features without an encoder). Each command lists the words that it accepts beside directories.
"""

import dataclasses

from etils import epath

from qbheat_jax import api, methods, paths
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.models.fields import OPTIONS

RANDOM, NO_ENCODER = "random", ("pixels", "histogram")

# How errors name an init that is a field of the config.
FIELD = "config field init"


@dataclasses.dataclass(frozen=True)
class Init:
    """A resolved init.

    Attributes:
      name: As it was given.
      model: The `api.Model` of a directory, else None.
      source: The spec of the images: the config's, else those that the model was trained on.
      image_size: Pixels a side, likewise.
    """

    name: str
    model: api.Model | None
    source: str
    image_size: int


def open_model(init, words=(), flag="--init"):
    """Return the `api.Model` of a directory, or None where init is one of the words that are accepted too.

    Raises:
      UserError: init is another word, empty, or a directory without a readable run. It names flag, value and what is
        accepted.
    """
    init = str(init)
    if init in words:
        return None
    accepted = f"it takes {', '.join(['the directory of a run or ported checkpoint', *filter(None, words)])}"
    if not init or init in (RANDOM, *NO_ENCODER):
        raise UserError(f"{_named(init, flag)} is not accepted: {accepted}")
    if not (epath.Path(paths.expand(init, flag)) / "config.json").exists():
        raise UserError(
            f"{_named(init, flag)} is not accepted: {init} holds no run: there is no config.json in it; {accepted}"
        )
    return api.load(init)


def resolve(init, config, words=(RANDOM,), flag="--init"):
    """Return the `Init` of a command that takes images and their size from the config or, failing that, from init.

    Args:
      init: A directory, or one of the words.
      config: With `data.source`, `image_size` (0: open) and `encoder.name`.
      words: Which of RANDOM and NO_ENCODER the command takes.
      flag: How errors name init.

    Raises:
      UserError: As `open_model`; or init leaves open what the config does too; or the size does not fit the encoder.
    """
    init = str(init)
    model = open_model(init, words, flag)
    if model is None:
        needed = ["data.source", "image_size", *(["encoder.name"] if init == RANDOM else [])]
        given = config_lib.flatten(config.to_dict())
        if not all(given[name] for name in needed):
            fields = ", ".join(f"{name}={given[name]!r}" for name in needed)
            raise UserError(
                f"{_named(init, flag)} brings no images and no encoder: config fields {fields} must all be set"
            )
        size, source, fields = config.image_size, config.data.source, config
    else:
        size = config.image_size or model.config.image_size
        source, fields = config.data.source or model.config.get("data", {}).get("source"), model.config
        if not source:
            raise UserError(f"{_named(init, flag)} brings no images: config field data.source='' must be set")
    if init not in NO_ENCODER:
        methods.check_size(size, fields.encoder.name, methods.build_encoder(fields))
    return Init(init, model, source, size)


def complete(config, table, own=()):
    """Complete the config of a run that begins with `config.init`, a directory or `random`.

    Args:
      config: The run's.
      table: Table of the config's fields.
      own: Names of encoder fields that the config may override, such as `encoder.stride`.

    Returns:
      (config with init's encoder, image size and data, the `api.Model` of init or None).
    """
    found = resolve(config.init, config, flag=FIELD)
    model = found.model
    if model is None:
        return config, None
    if model.encoder.image_size is not None:
        model = model.sized(found.image_size)
    kept = ("name", "stride", *OPTIONS)
    brought = {f"encoder.{name}": model.config.encoder[name] for name in kept}
    flat = config_lib.flatten(config.to_dict())
    brought = {name: value for name, value in brought.items() if name not in own or not flat[name]}
    fields = {**brought, "pixels": model.config.pixels, "image_size": found.image_size, "data.source": found.source}
    return with_fields(config, fields, table), model


def pretraining(config):
    """Return the variables that a pre-training begins with, as of `start`; None where `config.init` is empty or `random`.

    They are those of the config's own encoder, or of another one that it `adopt`s.

    Raises:
      UserError: The encoder of init is neither; names the fields to set.
    """
    model = open_model(config.init, ("", RANDOM), FIELD)
    if model is None:
        return None
    trained, wanted = (config_lib.flatten(c.to_dict()) for c in (model.config, config))
    encoder = methods.build_encoder(config)
    adopted = encoder.adopt(model.encoder, model.encoder_variables["params"])
    if adopted is not None and trained["pixels"] == wanted["pixels"]:
        return {"params": {"encoder": adopted}, "batch_stats": {}, "own": f"encoder/({encoder.own})"}
    same = ("encoder.name", *(f"encoder.{name}" for name in OPTIONS if name not in ("grid", "embedding")), "pixels")
    differ = [name for name in same if trained[name] != wanted[name]]
    if differ:
        have = ", ".join(f"{name}={trained[name]!r} (not {wanted[name]!r})" for name in differ)
        raise UserError(f"config field init={config.init} has an encoder with {have}: set the config's to the same")
    return start(model if encoder.image_size is None else model.sized(encoder.image_size))


def start(model):
    """Return the variables of a model's encoder as `loop.train` starts with them; None where there is no model."""
    return None if model is None else {name: {"encoder": tree} for name, tree in model.encoder_variables.items()}


def with_fields(config, fields, table):
    """Return the config with other values of some fields, {dotted key: value}, checked again."""
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), **fields}, table)


def _named(init, flag):
    return f"{flag} {init}" if flag.startswith("--") else f"{flag}={str(init)!r}"
