"""Texts of the pages: captions, labelled figures of a run, and numbers as people read them."""

import math

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.methods import base
from qbheat_jax.ops import quarters

MINUS, NARROW, NONE = "\u2212", "\u202f", "\u2013"
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")

PROTOCOLS = {
    "lin": "linear classifier on the frozen encoder's pooled features",
    "tran-1": "one transformer block and a linear classifier on the frozen encoder's feature map",
    "tran-4": "four transformer blocks and a linear classifier on the frozen encoder's feature map",
    "knn": "votes of the nearest training images by the frozen encoder's pooled features",
    "seg-lin": "linear classifier of every cell of the frozen encoder's map, scaled up to the pixels",
    "seg-knn": "votes of the nearest training cells by the frozen encoder's map, scaled up to the pixels",
    **{name: methods.METHODS[name].STORY for task in (base.DETECT, base.FINETUNE) for name in methods.names(task)},
}


def number(value, digits=3):
    """Format a number with significant digits: 1500 -> 1,500; 0.00015 -> 0.00015; None or not finite -> a dash."""
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if value is None or not math.isfinite(value):
        return NONE
    if value == int(value) and abs(value) < 1e12:
        text = f"{int(value):,}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            text = f"{mantissa} \u00d7 10{str(int(exponent)).translate(_RAISED)}"
    return text.replace("-", MINUS)


def percent(fraction, spread=None):
    """Format a fraction: 0.8123 -> 81.2 %; with a spread, 81.2 \u00b1 0.4 %."""
    if fraction is None:
        return NONE
    more = f" \u00b1 {100 * spread:.1f}" if spread is not None else ""
    return f"{100 * fraction:.1f}{more}{NARROW}%".replace("-", MINUS)


def points(difference):
    """Format a difference of fractions in signed points: 0.152 -> +15.2."""
    return NONE if difference is None else f"{100 * difference:+.1f}".replace("-", MINUS)


def duration(seconds):
    """Format seconds: 51.3 -> 51 s; 184 -> 3 min 4 s; 5000 -> 1 h 23 min."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def millions(count):
    """Format a count: 5812345 -> 5.81 million; 84210 -> 84.2 thousand."""
    if count < 1000:
        return str(count)
    return f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count / 1e3:.3g} thousand"


def placement(quarter):
    """Return the name of the visible block of a placement: 0 -> top left."""
    name = quarters.NAMES[quarter].replace("-", " ")
    return "centre" if name == "middle center" else name.replace("center", "centre")


def setting(value):
    """Format one value of the config as a user types it."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(setting, value))
    if value in ("", None):
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def document(key, fields):
    """Return the meaning of a config field; `warmup_epochs` has that of `warmup`."""
    if key in fields:
        return fields[key].doc
    base, _, unit = key.rpartition("_")
    return f"{fields[base].doc} (here in {unit})" if base in fields and unit in config_lib.UNITS else ""


def facts(config, step, images, parameters):
    """Return the labelled figures of a run, [(label, value)].

    Args:
      config: the run's.
      step: of the checkpoint shown.
      images: number of training images, or None where it is not known.
      parameters: of the encoder, or None.
    """
    batch, side = config.batch_size, config.image_size
    passes = f", {number(step * batch / images, 2)} passes over {number(images)} images" if images else ""
    rate = f"{number(config.learning_rate * batch / 256)} ({number(config.learning_rate)} for 256 images)"
    flat = config_lib.flatten(config)
    warmup = next((key for key in ("warmup", *(f"warmup_{unit}" for unit in config_lib.UNITS)) if flat.get(key)), None)
    if warmup:
        unit = warmup.removeprefix("warmup").lstrip("_") or "steps"
        rate += f", warm-up {number(flat[warmup])} {unit}"
    own = [(key, setting(flat[key])) for key in methods.of(config).FIELDS]
    return [
        ("Encoder", config.encoder.name + (f", {millions(parameters)} parameters" if parameters else "")),
        ("Images", f"{side} \u00d7 {side} pixels, random crops{', mirrored' if config.data.flip else ''}"),
        ("Length", f"{number(step)} steps of {number(batch)} images{passes}"),
        ("Optimizer", f"AdamW in {config.dtype}, weight decay {number(config.weight_decay)}"),
        ("Learning rate", f"{rate}, then a cosine to 0"),
        ("Weights", f"average over the steps, decay {config.ema:g}" if config.ema else "of the last step"),
        ("Seed", str(config.seed)),
        *own,
    ]
