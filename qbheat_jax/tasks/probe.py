"""Probe frozen features: train heads on them, choose one on held-out images, and test it once."""

import dataclasses
import time

import jax
import numpy as np
from etils import epath

from qbheat_jax import console, data, pretrained
from qbheat_jax.errors import UserError
from qbheat_jax.eval import accuracy, miou
from qbheat_jax.models.heads import BlockHead, LinearHead
from qbheat_jax.probe import encoders, fit, knn, online, segmentation, splits
from qbheat_jax.probe.augmented import Augmented
from qbheat_jax.probe.cache import FeatureCache, weights_digest
from qbheat_jax.probe.encode import TRIVIAL, Encoding
from qbheat_jax.probe.features import standard
from qbheat_jax.probe.fields import SEGMENTS
from qbheat_jax.probe.outputs import line, name, pictures, table, write
from qbheat_jax.train import lock, loggers

__all__ = ["FeatureCache", "line", "name", "run", "table"]

# Test images whose predicted masks are kept, drawn by the seed.
_SHOWN = 12


def run(config, workdir, init, store=None):
    """Probe one init by the config's protocol.

    Hyper-parameters are chosen on images that are neither trained on nor tested on. The test split is read once, at the
    end. Write WORKDIR/result.json, config.json and metrics.jsonl, the chosen head epoch by epoch. Segmentation also writes
    WORKDIR/predictions/INDEX.png, the predicted masks of some test images.

    Args:
      config: Of `probe.fields.PROBE`.
      workdir: Where the result goes.
      init: A directory, or a word of `pretrained`.
      store: A `FeatureCache` that several probes share; None: WORKDIR/features.

    Returns:
      The result, a dict.

    Raises:
      UserError: Splits or labels do not allow it, before anything is compiled.
    """
    started, workdir = time.perf_counter(), epath.Path(workdir)
    if jax.process_count() > 1:
        raise UserError(
            f"a probe runs in one process, on all devices of one machine; {jax.process_count()} were started"
        )
    loggers.check(config.loggers)
    frozen = encoders.open_init(init, config)
    if config.protocol not in TRIVIAL and init in pretrained.NO_ENCODER:
        raise UserError(f"--init {init} has one feature vector an image, which only protocol='lin' and 'knn' can probe")
    source = data.open_source(frozen.source, image_size=frozen.image_size, tfds_dir=config.data.tfds_dir)
    test = splits.test_split(source)
    frozen.spec.check(source, test)
    if config.protocol not in SEGMENTS:
        source.check_labels("train", test)
        if "val" in source.splits:
            source.check_labelled("val")
    with lock.held(workdir):
        probed = _segmented if config.protocol in SEGMENTS else _probed
        store = store or FeatureCache(workdir / "features")
        figures, rates, curve, masks = probed(config, frozen, source, test, store)
        result = {
            "protocol": config.protocol,
            "init": str(init),
            "data": source.spec,
            **figures,
            **_monitors(config, frozen, source, store),
            **frozen.description,
            "seconds": time.perf_counter() - started,
            "encode_images_per_second": rates,
            "command": console.command(),
        }
        pictures(workdir, masks)
        write(workdir, config, result, curve)
    return result


def _monitors(config, frozen, source, store):
    """Return the label-free monitors on a sample of train, the same for all probes of an encoder that share a store."""
    if not config.monitors.images:
        return {}
    about = {
        "weights": weights_digest(frozen.variables),
        "encoder": frozen.description,
        "data": source.identity("train"),
        "image_size": frozen.image_size,
        "seed": config.seed,
        "monitors": config.monitors.to_dict(),
        "crops": [config.data.crop_scale, config.data.crop_ratio, config.data.flip],
    }
    return store.figures(about, lambda: online.of_encoder(config, frozen, source, "train"))


def _probed(config, frozen, source, test, store):
    """Return (the result's figures, images encoded a second by split, the chosen head's curve, no masks)."""
    classes = len(source.class_names)
    encoding = _encoding(config, frozen, source, test, store)
    recipe = None if config.protocol == "knn" else _recipe(config, classes, encoding.shape[-1])
    examples = (_augmented if config.augment else _cached)(encoding, frozen, source, test, config)
    method = _Heads(recipe, config, examples) if recipe else _Neighbours(config, classes, examples)
    features, _ = _tested(encoding, source, test, config, examples)
    rank = method.ranks(features)

    figures = {
        **{key: float(value) for key, value in accuracy.top(rank).items()},
        "metrics": ["top1", "top5"],
        **_about(config, test, features, classes, examples, method),
        "chance": float(np.bincount(features.labels).max() / len(features)),
        "holdout_top1": method.holdout_top1,
    }
    return figures, encoding.rates, method.curve, {}


def _segmented(config, frozen, source, test, store):
    """As `_probed`, by masks. The masks are {index of an example in its split: predicted mask uint8 [S, S]}."""
    names = frozen.spec.classes(source)
    encoding = _encoding(config, frozen, source, test, store)
    examples = _cached(encoding, frozen, source, test, config)
    if config.protocol == "seg-lin":
        method = segmentation.Heads(_recipe(config, len(names), encoding.shape[-1]), config, examples)
    else:
        method = segmentation.Neighbours(len(names), config, examples)
    features, index = _tested(encoding, source, test, config, examples)
    figures = {
        **segmentation.measure(method, features, names),
        "metrics": list(miou.QUOTED),
        **_about(config, test, features, len(names), examples, method),
        "constant": segmentation.constant(examples.train.labels, features.labels, names),
        "holdout_mIoU": method.holdout,
    }
    rows = np.random.default_rng(config.seed).permutation(len(features))[:_SHOWN]
    shown = np.concatenate([*method.predict(features.subset(rows))])[:, 0]
    return figures, encoding.rates, method.curve, {int(index[row]): mask for row, mask in zip(rows, shown)}


def _encoding(config, frozen, source, test, store):
    cached = [s for s in source.splits if s in ("train", "val", test) and not (s == "train" and config.augment)]
    return Encoding(frozen, config, store, sum(source.splits[s] for s in cached))


def _tested(encoding, source, test, config, examples):
    """Return (features of the test images, standardised as those of `examples`, their index in the split)."""
    features, index = encoding(source, test)
    return (features.standardised(*examples.standard) if config.standardise else features), index


def _about(config, test, features, classes, examples, method):
    """Return the fields that every result has."""
    return {
        "n": len(features),
        "split": test,
        "seed": config.seed,
        "fraction": config.data.fraction,
        "classes": classes,
        "n_train": len(examples.both if config.refit else examples.train),
        "n_holdout": len(examples.holdout),
        "hparams": method.hparams,
    }


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Features to train on, to choose on (`holdout`) and to train the chosen head on (`both`).

    standard: (mean, scale) of train.
    """

    train: object
    holdout: object
    both: object
    standard: tuple = (None, None)


def _rows(source, test, config, labels=None):
    """Return (rows of train to train on, (split, rows) to choose on).

    labels: int [n] of train, for few-shot alone.
    """
    few_shot = config.data.fraction < 1
    rows = splits.few(labels, config.data.fraction, config.seed) if few_shot else np.arange(source.splits["train"])
    if test == "test" and "val" in source.splits:
        own = splits.labels(source, "val") if few_shot else None
        held = splits.few(own, config.data.fraction, config.seed) if few_shot else np.arange(source.splits["val"])
        return rows, ("val", held)
    train, held = splits.hold_out(len(rows), config, labels[rows] if few_shot else None)
    return rows[train], ("train", rows[held])


def _cached(encoding, frozen, source, test, config):
    """Return `_Examples` whose images are encoded once, without augmentation."""
    features, index = encoding(source, "train")
    labels = None
    if config.data.fraction < 1:
        labels = np.full(source.splits["train"], -1, np.int32)
        labels[index] = features.labels
    rows, (split, held) = _rows(source, test, config, labels)
    train = features.subset(np.isin(index, rows))
    if split != "train":
        features, index = encoding(source, split)
    holdout = features.subset(np.isin(index, held))
    if not config.standardise:
        return _Examples(train, holdout, train.joined(holdout))
    moments = standard(x for _, x in train.blocks())
    train, holdout = train.standardised(*moments), holdout.standardised(*moments)
    return _Examples(train, holdout, train.joined(holdout), moments)


def _augmented(encoding, frozen, source, test, config):
    """Return `_Examples` whose training images are augmented and encoded again in every epoch."""
    labels = splits.labels(source, "train") if config.data.fraction < 1 else None
    rows, held = _rows(source, test, config, labels)
    parts = {"train": [("train", rows)], "holdout": [held], "both": [("train", rows), held]}
    view, moments = splits.Subset(source, parts), (None, None)
    if config.standardise:  # by images without augmentation, as in testing
        moments = standard(x for x, _, _ in encoding.batches(view, "train"))
    holdout = encoding(view, "holdout")[0].standardised(*moments)

    def examples(split):
        return Augmented(frozen, encoding.mapped, view, split, config, encoding.shape, *moments)

    return _Examples(examples("train"), holdout, examples("both"), moments)


class _Heads:
    """`lin` and `tran-N`: the head of a grid that is best on held-out images; `refit` trains it again on all images."""

    def __init__(self, recipe, config, examples):
        def top1(params):
            return accuracy.top(fit.ranks(recipe, params, examples.holdout))["top1"]

        (rate, decay), chosen, self.holdout_top1, self.curve = fit.choose(
            recipe, examples.train, config.seed, top1, "top1"
        )
        self.hparams = {"optimizer": config.optimizer, "weight_decay": decay}
        if config.optimizer != "ridge":
            self.hparams |= {"learning_rate": rate, "epochs": config.total_epochs, "augment": config.augment}
        self._recipe = dataclasses.replace(recipe, learning_rates=(rate,), weight_decays=(decay,))
        self._params = fit.fit(self._recipe, examples.both, config.seed) if config.refit else chosen

    def ranks(self, features):
        return fit.ranks(self._recipe, self._params, features)[:, 0]


class _Neighbours:
    """`knn`: the number of neighbours and the temperature that are best on held-out images."""

    curve = ()

    def __init__(self, config, classes, examples):
        self._classes, self._batch_size = classes, config.batch_size
        counts = [int(k) for k in config.knn.neighbours if k <= len(examples.train)]
        if not counts:
            raise UserError(
                f"config field knn.neighbours={config.knn.neighbours} is not accepted: there are "
                f"{len(examples.train)} training images"
            )
        distance, labels = knn.find(examples.train, examples.holdout, max(counts), config.batch_size)
        top1 = {
            (k, t): float((self._ranks(distance, labels, k, t, examples.holdout.labels) < 1).mean())
            for k in counts
            for t in config.knn.temperatures
        }
        self._chosen, self.holdout_top1 = max(top1.items(), key=lambda item: item[1])
        self.hparams = dict(zip(("neighbours", "temperature"), self._chosen))
        self._bank = examples.both if config.refit else examples.train

    def ranks(self, features):
        distance, labels = knn.find(self._bank, features, self._chosen[0], self._batch_size)
        return self._ranks(distance, labels, *self._chosen, features.labels)

    def _ranks(self, distance, labels, k, temperature, truth):
        return knn.ranks(knn.votes(distance, labels, k, temperature, self._classes), truth)


def _recipe(config, classes, channels):
    rates = config.learning_rates if config.optimizer != "ridge" else (0.0,)  # closed form, without a rate
    grid = [(rate, decay) for rate in rates for decay in config.weight_decays]
    if config.protocol in ("lin", "seg-lin"):
        head = LinearHead(classes)
    else:
        width = config.head.width or channels
        if width % config.head.heads or width % 4:
            raise UserError(
                f"config field head.width={width} is not accepted: it takes a multiple of 4 and of head.heads"
            )
        blocks = int(config.protocol.removeprefix("tran-"))
        head = BlockHead(
            classes, blocks, config.head.width, config.head.heads, config.head.dropout, config.head.drop_path
        )
    return (segmentation.CellRecipe if config.protocol in SEGMENTS else fit.Recipe)(
        head=head,
        classes=classes,
        learning_rates=tuple(rate for rate, _ in grid),
        weight_decays=tuple(decay for _, decay in grid),
        optimizer=config.optimizer,
        momentum=config.momentum,
        epochs=config.total_epochs,
        warmup_epochs=config.warmup_epochs,
        batch_size=config.batch_size,
        label_smoothing=config.label_smoothing,
    )
