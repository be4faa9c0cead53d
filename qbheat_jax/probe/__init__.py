"""Probing: how good are frozen features? Heads are trained on them, chosen on held-out images, and tested once."""

import dataclasses
import json
import logging
import shlex
import sys
import time

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax import data, metrics, sharding
from qbheat_jax.data import device_cache
from qbheat_jax.errors import UserError
from qbheat_jax.models.heads import BlockHead, LinearHead
from qbheat_jax.probe import encoders, fit
from qbheat_jax.probe.devices import pmap, pmap_batches

log = logging.getLogger("qbheat")


def run(config, workdir, init):
    """Probes one init (a run's directory, random, pixels, histogram) by the config's protocol -> result dict.

    Writes WORKDIR/result.json, config.json, and metrics.jsonl (the chosen head, epoch by epoch). Hyper-parameters are
    chosen on images that no head was trained on and that are not the test images; the test split is read once.
    Raises UserError for splits or labels that do not allow this, before anything is compiled.
    """
    started, workdir = time.perf_counter(), epath.Path(workdir)
    if jax.process_count() > 1:
        raise UserError(
            f"a probe runs in one process, on all devices of one machine; {jax.process_count()} were started"
        )
    frozen = encoders.open_init(init, config)
    if config.protocol != "lin" and init in encoders.TRIVIAL:
        raise UserError(f"--init {init} has one feature vector an image, which only protocol='lin' can probe")
    source = data.open_source(frozen.source, image_size=frozen.image_size, tfds_dir=config.data.tfds_dir)
    test = _test_split(source)
    source.check_labels("train", test)
    classes = len(source.class_names)

    splits = {
        "train": "train",
        "test": test,
        **({"holdout": "val"} if test == "test" and "val" in source.splits else {}),
    }
    features, labels, encode_rate = {}, {}, {}
    mapped = pmap(_cells(frozen, config))
    for name, split in splits.items():
        features[name], labels[name], encode_rate = encode(frozen, mapped, source, split, config)
    if "holdout" not in features:
        _hold_out(features, labels, config)
    if config.standardise:
        _standardise(features)

    recipe = _recipe(config, classes, features["train"].shape[-1])
    best, held_out, curve = _choose(recipe, features, labels, config.seed)
    chosen = dataclasses.replace(recipe, learning_rates=(best[0],), weight_decays=(best[1],))
    train, train_labels = features["train"], labels["train"]
    if config.refit:
        train, train_labels = (np.concatenate([x["train"], x["holdout"]]) for x in (features, labels))
    params = fit.fit(chosen, train, train_labels, config.seed)
    scores = {
        name: float(value[0]) for name, value in fit.accuracy(chosen, params, features["test"], labels["test"]).items()
    }

    hparams = {"optimizer": config.optimizer, "weight_decay": best[1]}
    if config.optimizer != "ridge":
        hparams |= {"learning_rate": best[0], "epochs": config.total_epochs}
    result = {
        "protocol": config.protocol,
        "init": str(init),
        "data": source.spec,
        **scores,
        "n": len(labels["test"]),
        "seed": config.seed,
        "classes": classes,
        "chance": float(np.bincount(labels["test"]).max() / len(labels["test"])),
        "holdout_top1": held_out,
        "n_train": len(train_labels),
        "n_holdout": len(labels["holdout"]),
        "hparams": hparams,
        **frozen.description,
        "seconds": time.perf_counter() - started,
        "encode_images_per_second": encode_rate,
        "command": shlex.join(["qbheat", *sys.argv[1:]]),
    }
    _write(workdir, config, result, curve)
    return result


def encode(frozen, mapped, source, split, config):
    """(features float32 [N, C] for lin, else [N, h, w, C]; labels int32 [N]; images/s) of a whole split, in its order.

    `mapped`: the pmapped `_cells` of the encoder. Images that cannot be read are left out and counted.
    """
    n = source.splits[split]
    size = (1, frozen.image_size, frozen.image_size, 3)
    shape = jax.eval_shape(_cells(frozen, config), frozen.variables, jax.ShapeDtypeStruct(size, np.uint8)).shape[1:]
    gib = n * np.prod(shape) * 4 / 2**30
    if gib > config.cache_gib:
        raise UserError(
            f"the features of {n} images take {gib:.1f} GiB, more than config field cache_gib={config.cache_gib}: raise it, "
            "or take fewer images"
        )
    bad = data.BadFiles(config.data.max_bad_fraction, n)
    # On one device, which takes batches of any size.
    alone = sharding.make_mesh({"data": 1, "fsdp": 1}, jax.local_devices()[:1])
    batches = data.eval_batches(
        source, split=split, batch_size=config.batch_size, image_size=frozen.image_size, seed=config.seed,
        placements=(0,), workers=config.data.workers, prefetch=config.data.prefetch, bad=bad,
        cache=device_cache.of(config.data, frozen.image_size, source, split, alone),
    )  # fmt: skip
    labels, start = [], time.perf_counter()

    def inputs():
        for batch in map(jax.device_get, batches):
            labels.append(batch["label"][batch["mask"]])
            yield batch["image"], batch["mask"]

    features = np.concatenate(list(pmap_batches(mapped, frozen.variables, inputs())))
    labels = np.concatenate(labels)
    if (labels < 0).any():
        raise UserError(f"data.source={source.spec!r} split {split!r} has {(labels < 0).sum()} images without a label")
    return features, labels, len(labels) / (time.perf_counter() - start)


def _cells(frozen, config):
    """The function (variables, images) -> the cells that the head sees: all for tran-N, their mean alone for lin."""

    def cells(variables, images):
        maps = frozen.features(variables, images)
        if config.protocol == "lin":
            return maps.mean((1, 2))
        pool = (config.head.pool, config.head.pool)
        return nn.avg_pool(maps, pool, pool)

    return cells


def _test_split(source):
    for name in ("test", "val"):
        if name in source.splits and "train" in source.splits:
            return name
    raise UserError(
        f"data.source={source.spec!r} has the splits {', '.join(source.splits)}: a probe needs train and test or val"
    )


def _hold_out(features, labels, config):
    """Moves a random `data.holdout` share of train to "holdout"."""
    n = len(labels["train"])
    count = round(n * config.data.holdout)
    if not 0 < count < n:
        raise UserError(f"config field data.holdout={config.data.holdout} leaves {count} of {n} images to choose on")
    order = np.random.default_rng(config.seed).permutation(n)
    for x in (features, labels):
        x["holdout"], x["train"] = x["train"][order[:count]], x["train"][order[count:]]


def _standardise(features):
    """Mean 0, variance 1 of each channel over the training features, in place; constant channels become 0."""
    axes = tuple(range(features["train"].ndim - 1))
    mean, std = features["train"].mean(axes, dtype=np.float64), features["train"].std(axes, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.abs(mean).max(), 1.0 / np.maximum(std, 1e-30), 0.0)
    for name, value in features.items():
        features[name] = ((value - mean) * scale).astype(np.float32)


def _recipe(config, classes, channels):
    rates = config.learning_rates if config.optimizer != "ridge" else (0.0,)  # closed form: there is no rate
    grid = [(rate, decay) for rate in rates for decay in config.weight_decays]
    if config.protocol == "lin":
        head = LinearHead(classes)
    else:
        width = config.head.width or channels
        if width % config.head.heads or width % 4:
            raise UserError(
                f"config field head.width={width} is not accepted: it takes a multiple of 4 and of head.heads"
            )
        head = BlockHead(classes, 1, config.head.width, config.head.heads, config.head.dropout, config.head.drop_path)
    return fit.Recipe(
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


def _choose(recipe, features, labels, seed):
    """((learning rate, weight decay), its held-out top-1, its curve as a list of metric lines)."""
    epochs = []

    def top1(params):
        return fit.accuracy(recipe, params, features["holdout"], labels["holdout"])["top1"]

    params = fit.fit(
        recipe,
        features["train"],
        labels["train"],
        seed,
        lambda epoch, params, losses: epochs.append((epoch, losses, top1(params))),
    )
    last = epochs[-1][2] if epochs else top1(params)
    best = int(np.argmax(last))
    curve = [
        {"step": epoch, "probe/loss": float(losses[best]), "probe/holdout_top1": float(accuracy[best])}
        for epoch, losses, accuracy in epochs
    ]
    return (recipe.learning_rates[best], recipe.weight_decays[best]), float(last[best]), curve


def _write(workdir, config, result, curve):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config_lib.to_json(config))
        writer = metrics.Writer(workdir)
        for line in curve:
            writer.write(line["step"], {name: value for name, value in line.items() if name != "step"})
        writer.close()
        (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error


def line(result):
    """One result in one line."""
    return (
        f"{result['protocol']} of {result['init']}: top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} on {result['n']} "
        f"test images ({result['seconds']:.0f} s)"
    )


def table(results):
    """Results as a Markdown table, with the accuracy of always naming the commonest class as its last row."""
    header = ("protocol", "init", "top-1", "top-5", "held-out", "images", "learning rate", "weight decay", "seed")
    rows = [header]
    for r in results:
        rate = r["hparams"].get("learning_rate")
        figures = (f"{r['top1']:.3f}", f"{r['top5']:.3f}", f"{r['holdout_top1']:.3f}", str(r["n"]))
        chosen = ("-" if rate is None else f"{rate:g}", f"{r['hparams']['weight_decay']:g}")
        rows.append((r["protocol"], r["init"], *figures, *chosen, str(r["seed"])))
    chance = f"{results[0]['chance']:.3f}"
    rows.append(("-", "always the commonest class", chance, "-", "-", str(results[0]["n"]), "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)
