"""Batches by keywords, for tests that vary one thing at a time."""

from qbheat_jax import data

_CROPS = ("crop_scale", "crop_ratio")


_SPEC = ("image_size", "seed", "flip", "placements", "views", "boxes", "jitter", *_CROPS)


def spec_of(image_size, seed, flip=False, placements=(0,), views=1, boxes=0, jitter=(1.0, 1.0), **crops):
    """Return the training spec of one crop, of `views` crops, or of a list of `boxes`. crops: crop_scale, crop_ratio."""
    how = {"image_size": image_size, "seed": seed, "placements": tuple(placements), "train": True, "flip": flip}
    how |= {name: tuple(scale) for name, scale in crops.items()}
    if boxes:
        return data.BoxesSpec(**how, jitter=tuple(jitter), count=boxes)
    return data.ViewsSpec(**how, views=views) if views > 1 else data.ImageSpec(**how)


def train_batches(source, **given):
    """Return `data.train_batches` of a source. given: arguments of `spec_of` and of `data.train_batches`."""
    spec, given = _split(given)
    return data.train_batches(source, spec, **given)


def eval_batches(source, **given):
    """Return `data.eval_batches` of a source. given: arguments of `spec_of` and of `data.eval_batches`."""
    spec, given = _split(given)
    return data.eval_batches(source, spec.evaluation(), **given)


def _split(given):
    spec = spec_of(**{name: value for name, value in given.items() if name in _SPEC})
    return spec, {name: value for name, value in given.items() if name not in _SPEC}
