"""Config fields of the training loop: length, optimizer, mesh, logging, checkpoints; and their checks."""

from qbheat_jax.config import BELOW_ONE, POSITIVE, Field, at_least, refuse
from qbheat_jax.errors import UserError
from qbheat_jax.train import loggers

_AXIS = (lambda v: v >= 1 or v == -1, "a number of devices, or -1 for all that are left")

LOGGERS = {
    "loggers": Field(
        "tensorboard",
        "where metrics go beside metrics.jsonl: tensorboard, csv, wandb, mlflow, or several, separated by commas; empty: "
        "nowhere else",
        (loggers.known, f"names of {', '.join(loggers.LOGGERS)}, separated by commas, or nothing"),
        resumable=True,
    ),
}
LENGTH = {
    "total_steps": Field(
        None,
        "length of the run in steps; exactly one of total_steps, total_epochs",
        POSITIVE,
        int,
        excludes=("total_epochs",),
    ),
    "total_epochs": Field(
        None, "length of the run in passes over the split", POSITIVE, float, excludes=("total_steps",)
    ),
}
LOOP = {
    "learning_rate_start": Field(0.0, "rate at the start of the warm-up, scaled as learning_rate is", at_least(0)),
    "learning_rate_end": Field(0.0, "rate at the end of the run, scaled as learning_rate is", at_least(0)),
    "warmup": Field(0, "linear warm-up; then a cosine to learning_rate_end", at_least(0), duration=True),
    "cosine_from": Field(
        "warmup",
        "where the cosine begins: at the end of the warm-up, or at the start of the run (as Swin's), where it takes over from "
        "the warm-up slightly below the peak",
        ("warmup", "start"),
    ),
    "optimizer": Field("adamw", "AdamW, or SGD with momentum and weight decay as PyTorch's", ("adamw", "sgd")),
    "momentum": Field(0.9, "momentum of sgd", BELOW_ONE),
    "weight_decay": Field(0.05, "weight decay; biases and norms are not decayed", at_least(0)),
    "weight_decay_end": Field(
        None, "weight decay at the end of the run, reached by a cosine; None: constant", at_least(0), float
    ),
    "adam_b1": Field(0.9, "AdamW's decay of the first moment", BELOW_ONE),
    "adam_b2": Field(0.95, "AdamW's decay of the second moment", BELOW_ONE),
    "adam_eps": Field(1e-8, "AdamW's epsilon, added to the root of the second moment", POSITIVE),
    "clip_norm": Field(0.0, "largest norm of the gradient; 0: no clipping", at_least(0)),
    "ema": Field(0.0, "EMA decay of the parameters; the average is evaluated; 0: no average", BELOW_ONE),
    "mesh.data": Field(-1, "devices over which the batch is split; -1: all that are left", _AXIS, resumable=True),
    "mesh.fsdp": Field(1, "devices over which batch and parameters are split", _AXIS, resumable=True),
    "mesh.model": Field(
        1, "devices over which heads and hidden units of transformer blocks are split", _AXIS, resumable=True
    ),
    "accumulate": Field(
        1, "gradient accumulation: parts of a batch, processed one after the other; see train/state.py", at_least(1)
    ),
    "remat": Field(
        "none",
        "rematerialisation of blocks, a policy of jax.checkpoint_policies (nothing_saveable takes the least memory and "
        "computes blocks twice); none: keep all activations",
        ("none", "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable"),
        resumable=True,
    ),
    "bn_groups": Field(
        1, "batch norm groups: parts of a batch with statistics of their own; 1: over the global batch", at_least(1)
    ),
    **LOGGERS,
    "log_every": Field(50, "steps between lines of metrics", POSITIVE, duration=True, resumable=True),
    "eval_every": Field(0, "steps between evaluations; 0: only at the end", at_least(0), duration=True, resumable=True),
    "images_every": Field(
        0,
        "steps between pictures in TensorBoard: reconstructions, features; 0: none",
        at_least(0),
        duration=True,
        resumable=True,
    ),
    "checkpoint_every": Field(
        1000,
        "steps between checkpoints; there is always one at the end",
        POSITIVE,
        duration=True,
        resumable=True,
    ),
    "keep": Field(3, "checkpoints kept", POSITIVE, resumable=True),
}

MONITORS = {
    "monitors.images": Field(
        256,
        "training images in the sample that label-free monitors and online probes are measured on; 0: none of them",
        at_least(0),
        resumable=True,
    ),
    "monitors.views": Field(
        8,
        "views of each image that LiDAR compares; there are as many views as images in the sample; 0: no LiDAR",
        (lambda v: v == 0 or v >= 2, "a number that is at least 2, or 0"),
        resumable=True,
    ),
}
ONLINE = {
    "monitors.probes": Field(
        "knn",
        "probes measured every eval_every steps where the training images have labels; empty: none",
        ("", "knn", "lin", "knn,lin"),
        resumable=True,
    )
}


def learning_rate(default):
    """Return the field `learning_rate` with a task's own default."""
    doc = "peak rate for a batch of 256; the run's is this times batch_size / 256"
    return {"learning_rate": Field(default, doc, POSITIVE)}


def check(values):
    """Raise UserError where the length, mesh or batch of a training run cannot be."""
    steps, epochs = values["total_steps"], values["total_epochs"]
    if (steps is None) == (epochs is None):
        raise UserError(f"config fields total_steps={steps} and total_epochs={epochs}: exactly one of them must be set")
    first, *others = [axis for axis in ("mesh.data", "mesh.fsdp", "mesh.model") if values[axis] == -1] or [None]
    if others:
        refuse(others[0], -1, f"a number of devices when {first} is -1: only one axis can take all that are left")
    for key in ("learning_rate_start", "learning_rate_end"):
        if values[key] > values["learning_rate"]:
            refuse(key, values[key], f"a number that is at most learning_rate={values['learning_rate']}")
    accumulate, groups = values["accumulate"], values.get("bn_groups", 1)
    if values["batch_size"] % (accumulate * groups):
        refuse("batch_size", values["batch_size"], f"a multiple of accumulate={accumulate} times bn_groups={groups}")
