"""A run in words, and numbers as the page writes them."""

import math

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.methods import base
from qbheat_jax.ops import quarters

MINUS, NARROW, NONE = "\u2212", "\u202f", "\u2013"
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")

PROTOCOLS = {
    "lin": "a linear classifier on the frozen encoder's averaged features",
    "tran-1": "one transformer block and a linear classifier on the frozen encoder's feature map",
    "tran-4": "four transformer blocks and a linear classifier on the frozen encoder's feature map",
    "knn": "the votes of the nearest training images, by the frozen encoder's averaged features",
    **{name: methods.METHODS[name].STORY for task in (base.DETECT, base.FINETUNE) for name in methods.names(task)},
}


def number(value, digits=3):
    """Significant digits for people: 1500 -> 1,500; 0.00015 -> 0.00015; None or not finite -> a dash."""
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
    """0.8123 -> 81.2 %; with a spread, 81.2 \u00b1 0.4 %."""
    if fraction is None:
        return NONE
    more = f" \u00b1 {100 * spread:.1f}" if spread is not None else ""
    return f"{100 * fraction:.1f}{more}{NARROW}%".replace("-", MINUS)


def points(difference):
    """A difference of fractions in points, signed: 0.152 -> +15.2."""
    return NONE if difference is None else f"{100 * difference:+.1f}".replace("-", MINUS)


def ahead(difference):
    """A difference of fractions in words: 0.152 -> 15.2 points ahead of; -0.01 -> 1.0 points behind."""
    return f"{100 * abs(difference):.1f} points {'ahead of' if difference >= 0 else 'behind'}"


def duration(seconds):
    """51.3 -> 51 s; 184 -> 3 min 4 s; 5000 -> 1 h 23 min."""
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
    """How many parameters: 5812345 -> 5.81 million; 84210 -> 84.2 thousand."""
    if count < 1000:
        return str(count)
    return f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count / 1e3:.3g} thousand"


def placement(quarter):
    """Placement index -> words for the visible block: 0 -> top left."""
    name = quarters.NAMES[quarter].replace("-", " ")
    return "centre" if name == "middle center" else name.replace("center", "centre")


def setting(value):
    """One value of the config as a reader would type it."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(setting, value))
    if value in ("", None):
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def document(key, fields):
    """What a config field means. `warmup_epochs` and its like borrow the words of `warmup`."""
    if key in fields:
        return fields[key].doc
    base, _, unit = key.rpartition("_")
    return f"{fields[base].doc} (here in {unit})" if base in fields and unit in config_lib.UNITS else ""


def story(config, step, sizes, parameters):
    """Return two paragraphs on a run.

    Args:
      config: The run's.
      step: Step of its checkpoint.
      sizes: {split: images}, or {}.
      parameters: Number of the encoder's parameters, or None.
    """
    count = f" with {millions(parameters)} parameters" if parameters else ""
    method = methods.of(config)
    details = method.details(config), _training(config, step, sizes.get(config.data.split))
    return [method.story(config, f"An encoder ({config.encoder.name}{count})"), " ".join(filter(None, details))]


def _training(config, step, images):
    batch = config.batch_size
    passes = f", about {number(step * batch / images, 2)} passes over {number(images)} images" if images else ""
    average = f" The weights used here are an average over the steps (decay {config.ema:g})." if config.ema else ""
    return (
        f"Training took {number(step)} steps of {number(batch)} "
        f"images{passes}, from random crops{' and mirror images' if config.data.flip else ''}, by AdamW in "
        f"{config.dtype} with a weight decay of {number(config.weight_decay)} and a learning rate of "
        f"{number(config.learning_rate * batch / 256)} ({number(config.learning_rate)} for every 256 images of a batch)"
        f"{_warmup(config)}. The seed was {config.seed}.{average}"
    )


def _warmup(config):
    for key, value in config_lib.flatten(config).items():
        if value and (key == "warmup" or key.startswith("warmup_")):
            unit = key.removeprefix("warmup").lstrip("_") or "steps"
            amount = f"{number(value)}{NARROW}% of the run" if unit == "percent" else f"{number(value)} {unit}"
            return f", reached after {amount} and then lowered to 0 along a cosine"
    return " that fell to 0 along a cosine"
