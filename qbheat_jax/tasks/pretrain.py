"""Pre-train an encoder: take a config and a workdir, leave checkpoints and figures."""

import json
import logging

import jax
from etils import epath

from qbheat_jax import atomic, console, data, methods, pretrained
from qbheat_jax import config as config_lib
from qbheat_jax.config import refuse
from qbheat_jax.data import labels
from qbheat_jax.errors import UserError
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.eval.label_free import LabelFree
from qbheat_jax.probe import online
from qbheat_jax.tasks import results
from qbheat_jax.train import lock, loop, optim
from qbheat_jax.train.config_tables import PRETRAIN

log = logging.getLogger("qbheat")


def run(config, workdir, traced=None):
    """Pre-train, or resume the run in the workdir; write WORKDIR/summary.json.

    Args:
      config: Of `config_tables.PRETRAIN`.
      workdir: The run's directory.
      traced: As of `loop.train`.

    Returns:
      The summary of `loop.train`, with the command.

    Raises:
      UserError: Config and data do not fit, before anything is compiled; or as `loop.train`.
    """
    config, objective, source = prepare(config)
    start = pretrained.pretraining(config)
    if start is not None:
        start = objective.init_copies(start)
    evaluators = [validation(config, objective, source)] if config.data.eval_split in source.splits else []
    evaluators += filter(None, [online.of_run(config, objective, source)])
    watched = pictures(config, objective, source)
    with lock.held(workdir):
        summary = loop.train(config, workdir, objective, source, evaluators, start, pictures=watched, traced=traced)
        if objective.classifies and jax.process_index() == 0:
            labels.save(workdir, [(name, name) for name in source.classes(config.data.split)])
        path = epath.Path(workdir) / "summary.json"
        finished = results.finished(path, summary)
        if finished is not None:
            return finished
        summary["command"] = console.command()
        if jax.process_index() == 0:
            atomic.write(path, json.dumps(summary, indent=2) + "\n")
        return summary


def prepare(config):
    """Return (the config completed from the data, its objective, its source). Raise UserError where they do not fit."""
    objective = methods.build(config)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    log.info("%s", data.describe(source))
    if config.data.split not in source.splits:
        raise UserError(
            f"config field data.split={config.data.split!r} is not accepted: {source.spec} has {', '.join(source.splits)}"
        )
    if source.splits[config.data.split] < config.batch_size:
        raise UserError(
            f"data.source={source.spec!r} has {source.splits[config.data.split]} images in {config.data.split}, fewer "
            f"than batch_size={config.batch_size}: give more images or a smaller batch_size"
        )
    if objective.classifies:
        config = with_classes(config, source)
    return config, methods.build(config, optim.run_schedule(config, source.splits[config.data.split])), source


def with_classes(config, source):
    """Return the config with head.classes set from the data, so that a workdir's config builds the whole model.

    Raises:
      UserError: The data have no labels, or another number of classes.
    """
    split, validation = config.data.split, config.data.eval_split
    source.check_labels(split, validation if validation in source.splits else split)
    known, asked = len(source.classes(split)), config.head.classes
    if asked not in (0, known):
        raise UserError(
            f"config field head.classes={asked} is not accepted: {source.spec} has {known} classes in {split}"
        )
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), "head.classes": known}, PRETRAIN)


def pictures(config, objective, source):
    """Return the `ImageSummaries` that `loop.train` shows every `images_every` steps, or None where that is 0."""
    examples = source.splits[config.data.split]
    every = optim.duration(config, "images_every", optim.total_steps(config, examples), examples)
    if not every:
        return None
    if objective.encoder.takes_clips:
        refuse("images_every", every, f"0 with {config.encoder.name}, an encoder of clips")
    from qbheat_jax.analysis.image_summaries import ImageSummaries  # loads what other runs do without

    return ImageSummaries(config, objective)


def validation(config, objective, source):
    """Return the `Evaluator` of the method's own figures on `data.eval_split`.

    Unreadable images of that split never end a run.
    """
    return Evaluator.of_run(LabelFree(objective), source, config.data.eval_split, config, max_bad_fraction=1.0)
