"""Fine-tuning: encoder and classifier trained together from end to end, through the one training loop, tested once."""

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from qbheat_jax import api, data, methods, pytree
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.probe import scores, splits
from qbheat_jax.probe.pmap import pmap_batches
from qbheat_jax.tasks import classify, pretrained, results
from qbheat_jax.train import lock, loop


def run(config, workdir):
    """Fine-tunes as the config says, or goes on with the run in the workdir -> result dict, also WORKDIR/result.json.

    The workdir is then a classifier's, as a ported checkpoint's is: `api.load` and every command take it. The test split is
    read once, after the last step. Everything that can be wrong with config or data is found before anything is compiled.
    """
    config, model = pretrained.complete(config, config_lib.FINETUNE)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    test = splits.test_split(source)
    source.check_labels(config.data.split, test)
    if config.data.split == test:
        raise UserError(f"config field data.split={test!r} is not accepted: it is the split that is tested on")
    config = _with(config, {"head.classes": len(source.class_names)})
    objective = methods.build(config)
    check_layer_decay(config, objective.encoder)
    shown = _training_images(source, config)
    evaluators = []
    if config.data.eval_split in source.splits and config.data.eval_split not in (test, config.data.split):
        evaluators = [Accuracy(objective, source, config.data.eval_split, config)]
        source.check_labelled(config.data.eval_split)
    start = pretrained.start(model)

    with lock.held(workdir):
        summary = loop.train(
            config,
            workdir,
            objective,
            shown,
            evaluators,
            start,
            lambda params: lr_multipliers(params, objective.encoder, config.layer_decay),
        )
        path = epath.Path(workdir) / "result.json"
        finished = results.finished(path, summary)
        if finished is not None:
            return finished
        tuned = api.load(workdir)
        accuracy = Accuracy(tuned.objective, source, test, config)
        tested = accuracy(tuned.variables)
        result = {
            "protocol": "finetune",
            "init": config.init,
            "data": source.spec,
            "top1": tested[f"{test}/top1"],
            "top5": tested[f"{test}/top5"],
            "n": accuracy.n,
            "split": test,
            "seed": config.seed,
            "fraction": config.data.fraction,
            "classes": config.head.classes,
            "chance": accuracy.chance,
            "holdout_top1": summary.get(f"{config.data.eval_split}/top1"),
            "n_train": shown.splits[config.data.split],
            "hparams": {
                name: config[name] for name in ("learning_rate", "weight_decay", "layer_decay", "mixup", "cutmix")
            },
            **results.trained(config, summary),
        }
        results.save(workdir, result, source.class_names)
        return result


def check_layer_decay(config, encoder):
    """Raise UserError where `layer_decay` is below 1 and the encoder defines no order of its layers."""
    if config.layer_decay < 1 and encoder.layer_of is None:
        raise UserError(
            f"config field layer_decay={config.layer_decay} is not accepted: encoder.name={config.encoder.name!r} defines "
            "no order of its layers; it takes 1.0"
        )


def lr_multipliers(params, encoder, decay):
    """Return the learning-rate multiplier of each leaf: `decay` to the power of the layers between it and the head.

    Layer-wise decay as in BEiT (arXiv 2106.08254).

    Args:
      params: {"encoder", "head"} trees of arrays or shapes.
      encoder: models.encoder.Encoder with `layer_of`, or any where `decay` is 1.
      decay: float in (0, 1].
    """

    def multiplier(name, _):
        part, name = name.split("/", 1)
        return decay ** encoder.layer_of(name) if part == "encoder" and decay < 1 else 1.0

    return pytree.map_with_names(multiplier, params)


class Accuracy:
    """Top-1 and top-5 of a classifier over a split, every image counted once, through a pmap loop.

    n and chance (the share of the commonest class) are known once it has run.
    """

    def __init__(self, objective, source, split, config):
        self._source, self._split, self._config = source, split, config
        self.n, self.chance = 0, 0.0
        self._mapped = classify.mapped(objective)

    def __call__(self, variables):
        config, split, source = self._config, self._split, self._source
        several = jax.process_count() > 1
        if several:  # each process looks at its share of the images with the whole model
            variables = multihost_utils.process_allgather(variables, tiled=True)
        batches = data.eval_batches(
            source, split=split, batch_size=config.batch_size, image_size=config.image_size, seed=config.seed, placements=(0,),
            process_index=jax.process_index(), process_count=jax.process_count(), workers=config.data.workers,
            prefetch=config.data.prefetch, bad=data.BadFiles(config.data.max_bad_fraction, source.splits[split]),
        )  # fmt: skip
        taken = []

        def inputs():
            for batch in batches:
                taken.append(batch["label"][batch["mask"]])
                yield batch["image"], batch["mask"]

        counts = np.zeros(2 + config.head.classes, np.int64)  # right, in the top 5, images of each class
        for logits in pmap_batches(self._mapped, variables, inputs()):
            truth = taken.pop(0)
            source.check_labelled(split, truth)
            found = scores.top(scores.ranks(logits, truth), config.head.classes) if len(truth) else {}
            counts[:2] += [round(found.get(name, 0.0) * len(truth)) for name in ("top1", "top5")]
            counts[2:] += np.bincount(truth, minlength=config.head.classes)
        if several:
            counts = multihost_utils.process_allgather(counts).sum(0)
        self.n = int(counts[2:].sum())
        if not self.n:
            raise UserError(f"data.source={source.spec!r} split {split!r} has no image that can be read")
        self.chance = float(counts[2:].max() / self.n)
        return {f"{split}/top1": float(counts[0] / self.n), f"{split}/top5": float(counts[1] / self.n)}


def _with(config, fields):
    return pretrained.with_fields(config, fields, config_lib.FINETUNE)


def _training_images(source, config):
    """The source, its training split cut down to `data.fraction`. Raises UserError where a batch has more images."""
    split = source.split(config.data.split)
    if config.data.fraction < 1:
        rows = splits.few(splits.labels(source, split), config.data.fraction, config.seed)
        source = splits.Subset(source, {config.data.split: [(split, rows)]})
    source.check_labelled(split)
    n = source.splits[config.data.split]
    if n < config.batch_size:
        raise UserError(
            f"data.source={source.spec!r} has {n} images in {split} to train on, fewer than "
            f"batch_size={config.batch_size}: give more images or a smaller batch_size"
        )
    return source
