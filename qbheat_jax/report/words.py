"""A run in words, and numbers as the page writes them."""

import math

from qbheat_jax import config as config_lib
from qbheat_jax import quarters

MINUS, NARROW = "\u2212", "\u202f"

PLACEMENTS = {
    "corners": "in one of the four corners",
    "center": "in the centre",
    "corners_center": "in one of the four corners or in the centre",
    "all9": "at one of nine places",
}
PROPAGATORS = {
    "offset": "over a distance d a feature z becomes (I + dA) z",
    "power": "each cell's feature is (I + A/n) times its neighbour's, n cells to half an image",
    "exp": "over a distance d a feature z becomes exp(dA) z",
    "spectral": "over a distance d a feature z becomes V exp(d\u039b) V\u207b\u00b9 z, with one basis V for both axes",
}
PROTOCOLS = {
    "lin": "a linear classifier on the frozen encoder's averaged features",
    "tran-1": "one transformer block and a linear classifier on the frozen encoder's feature map",
}


def number(value, digits=3):
    """Significant digits for people: 1500 -> 1,500; 0.00015 -> 0.00015; None or not finite -> a dash."""
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value == int(value) and abs(value) < 1e12:
        text = f"{int(value):,}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            power = str(int(exponent)).translate(str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"))
            text = f"{mantissa} \u00d7 10{power}"
    return text.replace("-", MINUS)


def percent(fraction, spread=None):
    """0.8123 -> 81.2 %; with a spread, 81.2 \u00b1 0.4 %."""
    if fraction is None:
        return "\u2013"
    more = f" \u00b1 {100 * spread:.1f}" if spread is not None else ""
    return f"{100 * fraction:.1f}{more}{NARROW}%"


def points(difference):
    """A difference of fractions in points, signed: 0.152 -> +15.2."""
    return "\u2013" if difference is None else f"{100 * difference:+.1f}".replace("-", MINUS)


def duration(seconds):
    """51.3 -> 51 s; 184 -> 3 min 4 s; 5000 -> 1 h 23 min."""
    if seconds is None:
        return "\u2013"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def millions(count):
    """How many parameters: 5812345 -> 5.8 million; 84210 -> 84 thousand."""
    return f"{count / 1e6:.3g} million" if count >= 1e6 else f"{count / 1e3:.3g} thousand" if count >= 1e3 else str(count)


def placement(quarter):
    """Placement index -> words for the visible block: 0 -> top left."""
    name = quarters.NAMES[quarter].replace("-", " ")
    return "centre" if name == "middle center" else name.replace("center", "centre")


def setting(value):
    """One value of the config as a reader would type it."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(setting, value))
    return f"{value:g}" if isinstance(value, float) else "\u2013" if value in ("", None) else str(value)


def document(key, fields):
    """What a config field means. `warmup_epochs` and its like borrow the words of `warmup`."""
    if key in fields:
        return fields[key].doc
    base, _, unit = key.rpartition("_")
    return f"{fields[base].doc} (here in {unit})" if base in fields and unit in config_lib.UNITS else ""


def story(config, step, sizes, parameters):
    """The run as sentences -> list of paragraphs. sizes: {split: images} or {}; parameters: the encoder's, or None."""
    size = config.image_size
    count = f" ({millions(parameters)} parameters)" if parameters else ""
    propagator, directions = PROPAGATORS[config.heat.propagator], config.heat.directions
    own = "a matrix of its own for each of the four directions" if directions == "untied" else "steps back invert steps ahead"
    depth = config.decoder.depth
    blocks = f"{depth} transformer block{'s' * (depth != 1)}, {config.decoder.width} channels wide," if depth else "one linear layer"
    cells = "the masked pixels" if config.loss_on == "masked" else "all pixels"
    patches = ", normalised within each patch" if config.norm_pix else ""
    task = (
        f"The encoder {config.encoder.name}{count} was shown a quarter of each {size} \u00d7 {size} image, one block "
        f"{PLACEMENTS[config.quarter.placements]}. Its features were carried into the three hidden quarters by "
        f"linear maps that are the same everywhere, as the heat equation asks ({config.heat.propagator}: {propagator}; "
        f"{own}). A small decoder ({blocks.rstrip(',')}) turned the completed features into pixels, and the "
        f"mean squared error on {cells}{patches} was all there was to learn from: no labels were used."
    )
    images = sizes.get(config.data.split)
    seen = step * config.batch_size
    passes = f", about {number(seen / images, 2)} passes over {number(images)} images" if images else ""
    average = f" The weights used here are an average over the steps (decay {config.ema:g})." if config.ema else ""
    training = (
        f"It trained for {number(step)} steps of {number(config.batch_size)} images{passes}, from random crops"
        f"{' and mirror images' if config.data.flip else ''}. The optimiser was AdamW in {config.dtype} arithmetic, with "
        f"a peak learning rate of {number(config.learning_rate * config.batch_size / 256)} "
        f"({number(config.learning_rate)} for every 256 images of a batch){_warmup(config)} and a weight decay of "
        f"{number(config.weight_decay)}. Seed: {config.seed}.{average}"
    )
    return [task, training]


def _warmup(config):
    for key, value in config_lib.flatten(config).items():
        if key == "warmup" or key.startswith("warmup_"):
            unit = key.removeprefix("warmup").lstrip("_") or "steps"
            if value:
                amount = f"{number(value)} % of the run" if unit == "percent" else f"{number(value)} {unit}"
                return f", reached after {amount} and lowered to 0 along a cosine"
    return ", lowered to 0 along a cosine"
