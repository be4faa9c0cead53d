"""Fine-tune an encoder and a classifier end to end, then test once."""

from etils import epath

from qbheat_jax import api, data, methods, pretrained, pytree
from qbheat_jax.errors import UserError
from qbheat_jax.eval.accuracy import Accuracy
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.probe import splits
from qbheat_jax.tasks import results
from qbheat_jax.train import lock, loop, optim
from qbheat_jax.train.config_tables import FINETUNE


def run(config, workdir):
    """Fine-tune, or resume the run in the workdir; write WORKDIR/result.json.

    The workdir then holds a classifier that `api.load` and every command take. The test split is read once, after the
    last step.

    Args:
      config: Of `config_tables.FINETUNE`.
      workdir: The run's directory.

    Returns:
      The result, a dict.

    Raises:
      UserError: Config and data do not fit, before anything is compiled; or as `loop.train`.
    """
    config, model = pretrained.complete(config, FINETUNE)
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    test = splits.test_split(source)
    source.check_labels(config.data.split, test)
    if config.data.split == test:
        raise UserError(f"config field data.split={test!r} is not accepted: it is the split that is tested on")
    config = _with(config, {"head.classes": len(source.class_names)})
    shown = _training_images(source, config)
    objective = methods.build(config, optim.run_schedule(config, shown.splits[config.data.split]))
    check_layer_decay(config, objective.encoder)
    evaluators = []
    if config.data.eval_split in source.splits and config.data.eval_split not in (test, config.data.split):
        evaluators = [accuracy(objective, source, config.data.eval_split, config)]
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
        tester = accuracy(tuned.objective, source, test, config)
        tester(tuned.variables)
        tested = tester.measured
        result = {
            "protocol": "finetune",
            "init": config.init,
            "data": source.spec,
            **tested.figures,
            "n": tested.n,
            "split": test,
            "seed": config.seed,
            "fraction": config.data.fraction,
            "classes": config.head.classes,
            "chance": tested.details["chance"],
            "holdout_top1": summary.get(f"{config.data.eval_split}/{Accuracy.headline}"),
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


def accuracy(objective, source, split, config):
    """Return the `Evaluator` of a classifier's accuracy on a split."""
    return Evaluator.of_run(Accuracy(objective, source, split, config.head.classes), source, split, config)


def _with(config, fields):
    return pretrained.with_fields(config, fields, FINETUNE)


def _training_images(source, config):
    """Return the source with its training split reduced to `data.fraction`. Raise UserError where a batch is larger."""
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
