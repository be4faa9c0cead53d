"""Pre-training: a config and a workdir in, a checkpoint and figures out."""

import json
import logging

import jax
import numpy as np
from etils import epath

from qbheat_jax import api, atomic, data, device_mesh, methods
from qbheat_jax import config as config_lib
from qbheat_jax.data import device_cache, labels
from qbheat_jax.errors import UserError
from qbheat_jax.ops import quarters
from qbheat_jax.tasks import results
from qbheat_jax.train import lock, loop, optim, state

log = logging.getLogger("qbheat")


def run(config, workdir, traced=None):
    """Pre-trains as the config says, or goes on with the run that the workdir holds. Returns `loop.train`'s summary.

    traced: as of `loop.train`.
    Everything that can be wrong with config or data is found before anything is compiled.
    """
    config, objective, source = prepare(config)
    start = starting_encoder(config) if config.init else None
    if start is not None and hasattr(objective, "started"):
        start = objective.started(start)
    evaluators = [Validation(config, objective, source)] if config.data.eval_split in source.splits else []
    watched = pictures(config, objective, source)
    with lock.held(workdir):
        summary = loop.train(config, workdir, objective, source, evaluators, start, pictures=watched, traced=traced)
        if config.objective == "supervised" and jax.process_index() == 0:
            labels.save(workdir, [(name, name) for name in source.classes(config.data.split)])
        path = epath.Path(workdir) / "summary.json"
        finished = results.finished(path, summary)
        if finished is not None:
            return finished
        summary["command"] = results.command()
        if jax.process_index() == 0:
            atomic.write(path, json.dumps(summary, indent=2) + "\n")
        return summary


def prepare(config):
    """(the config with what only the data tell, its objective, its source). Raises UserError where they do not fit."""
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
    if config.objective == "supervised":
        config = with_classes(config, source)
        objective = methods.build(config)
    return config, objective, source


def with_classes(config, source):
    """The config with head.classes as the data have it. Raises UserError where they have no labels, or others.

    So the config that a workdir keeps says all that the model is built from.
    """
    split, validation = config.data.split, config.data.eval_split
    source.check_labels(split, validation if validation in source.splits else split)
    known, asked = len(source.classes(split)), config.head.classes
    if asked not in (0, known):
        raise UserError(
            f"config field head.classes={asked} is not accepted: {source.spec} has {known} classes in {split}"
        )
    return config_lib.resolve({**config_lib.flatten(config.to_dict()), "head.classes": known})


def starting_encoder(config):
    """Variables {"params": {"encoder"}, "batch_stats": {"encoder"}} of the run or ported checkpoint `config.init`.

    Raises UserError where its encoder is not the config's, naming the fields to set.
    """
    trained = config_lib.flatten(api.read_config(config.init).to_dict())
    wanted = config_lib.flatten(config.to_dict())
    same = ("encoder.name", "encoder.class_token", "encoder.position", "pixels")
    differ = [name for name in same if trained[name] != wanted[name]]
    if differ:
        have = ", ".join(f"{name}={trained[name]!r} (not {wanted[name]!r})" for name in differ)
        raise UserError(f"config field init={config.init} has an encoder with {have}: set the config's to the same")
    model = api.load(config.init)
    size = methods.build_encoder(config).image_size
    if size is not None:
        model = model.sized(size)
    return {name: {"encoder": tree} for name, tree in model.encoder_variables.items()}


def pictures(config, objective, source):
    """What `loop.train` shows every `images_every`, or None where that is 0."""
    examples = source.splits[config.data.split]
    if not optim.duration(config, "images_every", optim.total_steps(config, examples), examples):
        return None
    from qbheat_jax.analysis.image_summaries import ImageSummaries  # with all that looks at runs, which is above this

    return ImageSummaries(config, objective)


class Validation:
    """The objective's loss over `data.eval_split`: no augmentation, fixed placements, every example counted once."""

    def __init__(self, config, objective, source):
        self._config, self._source = config, source
        self._mesh = device_mesh.make_mesh(config.mesh)
        self._cache = device_cache.of(config.data, config.image_size, source, config.data.eval_split, self._mesh)
        self._step = jax.jit(lambda variables, batch: state.evaluate(objective, variables, batch))

    def __call__(self, variables):
        config, totals, count = self._config, {}, 0
        batches = data.eval_batches(
            self._source,
            split=config.data.eval_split,
            batch_size=config.batch_size,
            image_size=config.image_size,
            seed=config.seed,
            placements=quarters.PLACEMENT_SETS[config.quarter.placements],
            rows=device_mesh.rows(self._mesh, config.batch_size),
            cache=self._cache,
        )
        for batch in batches:
            batch = {name: batch[name] for name in loop.batch_shapes(config)}
            batch = device_mesh.put_batch(batch, self._mesh, config.batch_size) if self._cache is None else batch
            figures = jax.device_get(self._step(variables, batch))
            n = figures.pop("count")
            count += n
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + np.float64(value) * n
        return {f"{config.data.eval_split}/{name}": float(total / count) for name, total in totals.items()}
