"""What `--init DIR | random` brings to a run that goes on from an encoder: its fields and its weights."""

from qbheat_jax import api, methods
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError


def complete(config, table, own=()):
    """(the config with what `init` brings: encoder, image size, data; the model of init, None where it is random).

    table: the fields that the config is of. own: fields in which the config, where it sets them, goes before `init`.
    """
    if not config.init:
        raise UserError(
            "config field init='' is not accepted: it takes a run's or a ported checkpoint's DIR, or random"
        )
    if config.init == "random":
        if not (config.data.source and config.image_size and config.encoder.name):
            raise UserError(
                f"init random brings no images and no encoder: config fields data.source={config.data.source!r}, "
                f"image_size={config.image_size} and encoder.name={config.encoder.name!r} must all be set"
            )
        return config, None
    trained = api.read_config(config.init)
    size = config.image_size or trained.image_size
    source = config.data.source or trained.get("data", {}).get("source")
    if not source:
        raise UserError(f"init {config.init} brings no images: config field data.source must be set")
    stride = methods.build_encoder(trained).stride
    if size % stride:
        raise UserError(
            f"config field image_size={size} is not accepted: {trained.encoder.name} takes a multiple of {stride}"
        )
    model = api.load(config.init)
    if model.encoder.image_size is not None:
        model = model.sized(size)
    kept = ("name", "stride", "class_token", "position", "grid")
    brought = {f"encoder.{name}": model.config.encoder[name] for name in kept}
    flat = config_lib.flatten(config.to_dict())
    brought = {name: value for name, value in brought.items() if name not in own or not flat[name]}
    fields = {**brought, "pixels": model.config.pixels, "image_size": size, "data.source": source}
    return with_fields(config, fields, table), model


def start(model):
    """The variables that `loop.train` starts the encoder with, None where `complete` gave no model."""
    return None if model is None else {name: {"encoder": tree} for name, tree in model.encoder_variables.items()}


def with_fields(config, fields, table):
    """The config with other values of some fields, {dotted key: value}, checked again."""
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), **fields}, table)
