"""A run in words, and numbers as the page writes them."""

import math

from qbheat_jax import config as config_lib
from qbheat_jax.ops import quarters

MINUS, NARROW, NONE = "\u2212", "\u202f", "\u2013"
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")

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
    "tran-4": "four transformer blocks and a linear classifier on the frozen encoder's feature map",
    "knn": "the votes of the nearest training images, by the frozen encoder's averaged features",
    "dense": "a detector that looks at every cell of the encoder's maps",
    "detr": "a detector whose queries look at the encoder's maps",
    "finetune": "the encoder and a linear classifier, trained together from end to end",
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
    """The run as sentences -> two paragraphs. sizes: {split: images} or {}; parameters: the encoder's, or None."""
    return [_lead(config, parameters), _details(config, step, sizes.get(config.data.split))]


def loss(config):
    """What the loss is, in a few words."""
    cells = " on hidden cells" if config.loss_on == "masked" else ""
    if config.objective == "simmim" and config.simmim.error == "l1":
        return f"mean absolute error{cells}"
    names = {"moco": "InfoNCE, the cross-entropy of finding the other view", "supervised": "cross-entropy"}
    return names.get(config.objective, f"mean squared error{cells}")


def _lead(config, parameters):
    count = f" with {millions(parameters)} parameters" if parameters else ""
    cells = "the hidden pixels" if config.loss_on == "masked" else "all pixels"
    if config.objective != "qbheat":
        encoder = f"An encoder ({config.encoder.name}{count})"
        return _OTHERS[config.objective].format(encoder=encoder, cells=cells, config=config)
    return (
        f"One quarter of a {config.image_size} \u00d7 {config.image_size} image was visible, and the rest had to be "
        f"predicted. An encoder ({config.encoder.name}{count}) turned the visible quarter into features; linear maps "
        "that are the same everywhere, as the heat equation asks, carried the features into the three hidden quarters; "
        f"and a small decoder turned them into pixels. The error on {cells} was all there was to learn from: no labels "
        "were used."
    )


# What the methods that QB-Heat is compared with do.
_OTHERS = {
    "moco": (
        "{encoder} was shown two random crops of an image in random colours, and had to tell that they are of one image: the "
        "feature of the one is to be nearer to that of the other, as a slowly moving average of the encoder gives it, than "
        "to those of {config.moco.queue:,} crops before (MoCo-v2). No labels were used."
    ),
    "mae": (
        "{encoder} was shown the cells of an image that were left when {config.mae.mask_ratio:.0%} of them, drawn at random, "
        "had been taken out, and a small decoder had to predict the others (MAE). The error on {cells} was all there was to "
        "learn from: no labels were used."
    ),
    "simmim": (
        "{encoder} was shown whole images in which {config.simmim.mask_ratio:.0%} of the patches, drawn at random and of "
        "{config.simmim.mask_size} pixels a side, were masked, and one linear layer on its features had to predict their "
        "pixels (SimMIM). The error on {cells} was all there was to learn from: no labels were used."
    ),
    "supervised": (
        "{encoder} and a classifier on its features were trained together on images and their labels, to be compared with "
        "encoders that saw none."
    ),
}


def _details(config, step, images):
    return f"{_method(config)}{_training(config, step, images)}"


def _method(config):
    """Sentences on the parts beside the encoder."""
    if config.objective in ("moco", "supervised") or (config.objective == "simmim" and config.simmim.error == "l1"):
        return ""
    heat, depth = config.heat, config.decoder.depth
    untied = heat.directions == "untied"
    own = "each of the four directions has a matrix of its own" if untied else "a step back inverts the step ahead"
    norm = ", after a layer norm" if heat.norm == "layer" else ""
    blocks = f"{depth} transformer block{'s' * (depth != 1)} {config.decoder.width} channels wide"
    patches = " The targets were normalised within each patch." if config.norm_pix else ""
    if config.norm_pix and config.norm_pix_statistics > 0:
        patches = " The targets were each patch's normalised pixels and, beside them, their mean and deviation"
        if config.objective == "qbheat":
            patches += (
                "; the pictures below are un-normalised with the mean and deviation that were predicted, their mean "
                "colours interpolated between the patches"
            )
        patches += "."
    if config.hog > 0:
        patches += (
            f" Which way the edges of each patch run (a histogram) was asked for too, with a weight of {config.hog:g}."
        )
    decoder = f"The decoder is {blocks if depth else 'one linear layer'}."
    if config.objective != "qbheat":
        text = (f"{decoder}{patches}" if config.objective == "mae" else patches).strip()
        return f"{text} " if text else ""
    return (
        f"The visible block lay {PLACEMENTS[config.quarter.placements]}. The maps are those of "
        f"\u201c{heat.propagator}\u201d: {PROPAGATORS[heat.propagator]}{norm}, and {own}. {decoder}{patches} "
    )


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
