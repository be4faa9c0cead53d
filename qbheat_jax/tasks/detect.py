"""Train a detector, or another method of its task, on an encoder's maps, by default frozen, and measure it."""

import json

import jax
from etils import epath

from qbheat_jax import api, atomic, data, methods, pretrained, pytree
from qbheat_jax.errors import UserError
from qbheat_jax.eval import metric_of
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.tasks import results
from qbheat_jax.train import lock, loop, optim
from qbheat_jax.train.config_tables import DETECT

__all__ = ["checked", "line", "run"]


def run(config, workdir):
    """Train a method of the task, or resume the run in the workdir.

    Write WORKDIR/result.json, and the details of the metric on `data.eval_split`, each to a file of its own. A detector's
    are detections.json, what was found in COCO's result format, and curves.json, the precision of each class at recalls
    from 0 to 1.

    Args:
      config: Of `config_tables.DETECT`.
      workdir: The run's directory.

    Returns:
      The result, a dict.

    Raises:
      UserError: Config and data do not fit, before anything is compiled; or as `loop.train`.
    """
    config, model = pretrained.complete(config, DETECT, own=("encoder.stride",))
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    config = checked(config, source)
    objective = methods.build(config, optim.run_schedule(config, source.splits[config.data.split]))
    split = config.data.eval_split
    evaluator = None
    if split in source.splits:
        metric = metric_of(objective)(objective, source, split)
        evaluator = Evaluator.of_run(metric, source, split, config)

    with lock.held(workdir):
        summary = loop.train(
            config,
            workdir,
            objective,
            source,
            [evaluator] if evaluator else [],
            pretrained.start(model),
            lambda params: lr_multipliers(params, config),
        )
        path = epath.Path(workdir) / "result.json"
        finished = results.finished(path, summary)
        if finished is not None:
            return finished
        found = _measured(evaluator, workdir) if evaluator else None
        result = {
            "protocol": config.objective,
            "init": config.init,
            "data": source.spec,
            **(found.figures if found else {}),
            "metrics": list(metric_of(objective).quoted),
            "per_class": found.details["per_class"] if found else {},
            "n": found.n if found else 0,
            "seed": config.seed,
            "frozen": not config.tune,
            "n_train": source.splits[config.data.split],
            "hparams": {name: config[name] for name in ("learning_rate", "weight_decay", "batch_size")},
            **results.trained(config, summary),
        }
        results.save(workdir, result, source.class_names)
        return result


def line(result):
    """Return a result in one line."""
    quoted = metric_of(methods.METHODS[result["protocol"]]).quoted
    figures = ", ".join(f"{name} {result[name]:.3f}" for name in quoted if result.get(name) is not None)
    measured = f"{figures} on {result['n']} images" if figures else "not measured"
    return f"{result['protocol']} on {result['init']}: {measured} ({result['seconds']:.0f} s)"


def lr_multipliers(params, config):
    """Return the multiplier of each leaf's learning rate and weight decay; 0 freezes the encoder."""
    rate = config.encoder_rate if config.tune else 0.0
    return pytree.map_with_names(lambda name, _: rate if name.split("/")[0] == "encoder" else 1.0, params)


def checked(config, source):
    """Return the config with the number of classes of the data. Raise UserError where they cannot be trained on."""
    split, validation = source.split(config.data.split), config.data.eval_split
    if validation and validation not in source.splits:
        raise UserError(
            f"config field data.eval_split={validation!r} is not accepted: data.source={source.spec!r} has "
            f"{', '.join(source.splits)}; empty measures nothing"
        )
    if source.splits[split] < config.batch_size:
        raise UserError(
            f"data.source={source.spec!r} has {source.splits[split]} images in {split} to train on, fewer than "
            f"batch_size={config.batch_size}: give more images or a smaller batch_size"
        )
    methods.batch_spec(config).check(source, split)
    known, asked = len(source.class_names), config.detector.classes
    if asked not in (0, known):
        raise UserError(f"config field detector.classes={asked} is not accepted: {source.spec} has {known} classes")
    return pretrained.with_fields(config, {"detector.classes": known}, DETECT)


def _measured(evaluator, workdir):
    """Return what the evaluator measured on the newest checkpoint; write its details to WORKDIR/NAME.json."""
    if evaluator.measured is None:  # an earlier process finished the training
        evaluator(api.load(workdir).variables)
    for name, content in evaluator.measured.details.items():
        if jax.process_index() == 0 and name != "per_class":
            atomic.write(epath.Path(workdir) / f"{name}.json", json.dumps(content) + "\n")
    return evaluator.measured
