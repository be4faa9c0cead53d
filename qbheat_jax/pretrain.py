"""Pre-training: a config and a workdir in, a checkpoint and figures out."""

import json
import shlex
import sys

import jax
import numpy as np
from etils import epath

from qbheat_jax import data, loop, objectives, quarters, sharding, state
from qbheat_jax.errors import UserError


def run(config, workdir):
    """Pre-trains as the config says, or goes on with the run that the workdir holds. Returns `loop.train`'s summary.

    Everything that can be wrong with config or data is found before anything is compiled.
    """
    objective = objectives.build(config)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    if config.data.split not in source.splits:
        raise UserError(
            f"config field data.split={config.data.split!r} is not accepted: {source.spec} has {', '.join(source.splits)}"
        )
    if source.splits[config.data.split] < config.batch_size:
        raise UserError(
            f"data.source={source.spec!r} has {source.splits[config.data.split]} images in {config.data.split}, fewer "
            f"than batch_size={config.batch_size}: give more images or a smaller batch_size"
        )
    evaluators = [Validation(config, objective, source)] if config.data.eval_split in source.splits else []
    summary = loop.train(config, workdir, objective, source, evaluators)
    path = epath.Path(workdir) / "summary.json"
    if not summary["steps_run"] and path.exists():
        return json.loads(path.read_text())
    summary["command"] = shlex.join(["qbheat", *sys.argv[1:]])
    if jax.process_index() == 0:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class Validation:
    """The objective's loss over `data.eval_split`: no augmentation, fixed placements, every example counted once."""

    def __init__(self, config, objective, source):
        self._config, self._source = config, source
        self._mesh = sharding.make_mesh(config.mesh)
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
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in batches:
            batch = {name: batch[name] for name in loop.batch_shapes(config)}
            figures = jax.device_get(self._step(variables, sharding.put_batch(batch, self._mesh)))
            n = figures.pop("count")
            count += n
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + np.float64(value) * n
        return {f"{config.data.eval_split}/{name}": float(total / count) for name, total in totals.items()}
