"""Durations in steps, learning-rate schedules, and the optimizer chain."""

import math

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.errors import UserError
from qbheat_jax.methods import Schedule


def duration(config, name, total_steps, examples):
    """Return a duration of the config in steps. `examples`: images in an epoch.

    >>> duration({"warmup_epochs": 2.0, "batch_size": 100}, "warmup", 1000, 250)
    5
    """
    units = {
        name: 1.0,
        f"{name}_epochs": examples / config["batch_size"],
        f"{name}_examples": 1 / config["batch_size"],
        f"{name}_percent": (total_steps or 0) / 100,
    }
    given = [key for key in units if key in config and config[key] is not None]
    if len(given) != 1:
        raise UserError(f"exactly one of {', '.join(units)} must be set, not {', '.join(given) or 'none'}")
    steps = config[given[0]] * units[given[0]]
    return max(1, round(steps)) if steps > 0 else 0


def total_steps(config, examples):
    """Return the length of the run in steps, from total_steps or total_epochs."""
    if config.total_steps is not None:
        return config.total_steps
    # The epsilon: 0.29 epochs of 100 images are 29 steps, but the product of the floats is slightly less.
    return max(1, math.floor(config.total_epochs * examples / config.batch_size + 1e-9))


def run_schedule(config, examples=None):
    """Return the `methods.Schedule` of a run. examples: images in an epoch; None where no data has been opened."""
    known = examples is not None
    return Schedule(
        total_steps=total_steps(config, examples) if known or config.total_steps is not None else None,
        steps_per_epoch=examples / config.batch_size if known else None,
    )


def peak_learning_rate(config):
    """Return the peak learning rate, config.learning_rate x batch_size / 256."""
    return _scaled(config, "learning_rate")


def _scaled(config, name):
    """Return a learning rate of the config for its batch size."""
    return config[name] * config.batch_size / 256


def schedule(config, steps, examples):
    """Return the schedule step -> learning rate: linear warm-up, then a cosine that ends at the last step."""
    warmup = duration(config, "warmup", steps, examples)
    if warmup >= steps:
        raise UserError(f"warmup is {warmup} steps, but the run has {steps}: it must be shorter than the run")
    start, peak, end = (_scaled(config, f"learning_rate{name}") for name in ("_start", "", "_end"))
    cosine = optax.cosine_decay_schedule(peak, steps, end / peak)
    if not warmup:
        return cosine
    if config.cosine_from == "start":
        return optax.join_schedules(
            [optax.linear_schedule(start, peak, warmup), lambda step: cosine(step + warmup)], [warmup]
        )
    return optax.warmup_cosine_decay_schedule(start, peak, warmup, steps, end)


def decay_mask(params):
    """Return True for the leaves that weight decay applies to: kernels and matrices, not biases, norms and vectors."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def global_norm(tree):
    """Return the norm of all numbers of a tree of arrays, a float32 scalar."""
    return jax.lax.platform_dependent(tree, cuda=_norm_of_rows, default=optax.tree.norm)


def _norm_of_rows(tree):
    """Return the norm of the norms of all rows. A sum over each whole leaf takes a GPU two kernels a leaf."""
    rows = [jnp.sqrt(jnp.square(x).sum(-1)).reshape(-1) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.square(jnp.concatenate(rows)).sum())


def clip_by_global_norm(most):
    """Return optax.clip_by_global_norm by `global_norm`, so a step that reports the norm computes it once."""

    def clip(updates, _):
        norm = global_norm(updates)
        return jax.tree.map(lambda x: jax.lax.select(norm < most, x, (x / norm.astype(x.dtype)) * most), updates)

    return optax.stateless(clip)


def weight_decay(config, steps):
    """Return the weight decay, a number, or a schedule over the run's `steps` where `weight_decay_end` is set."""
    start, end = config.weight_decay, config.get("weight_decay_end")
    if end is None:
        return start
    return lambda step: end + (start - end) * (1.0 + jnp.cos(jnp.pi * jnp.minimum(step / steps, 1.0))) / 2.0


def sgd(config, schedule, steps=1):
    """Return SGD with momentum, whose weight decay is added to the gradient, as PyTorch's."""
    decay = optax.add_decayed_weights(weight_decay(config, steps), decay_mask)
    return optax.chain(decay, optax.sgd(schedule, config.momentum))


def optimizer(config, schedule, lr_multipliers=None, steps=1):
    """Return AdamW or SGD under a schedule as an optax transformation, with gradients clipped first where clip_norm is set.

    lr_multipliers: function from the tree of parameters to a tree of numbers that multiply their leaves' learning rates.
    steps: of the run, for the schedule of `weight_decay`.
    """
    optimizer = optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=weight_decay(config, steps),
        mask=decay_mask,
    )
    if config.optimizer == "sgd":
        optimizer = sgd(config, schedule, steps)
    if lr_multipliers is not None:
        scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, lr_multipliers(updates)))
        optimizer = optax.chain(optimizer, scale)
    if config.clip_norm:
        return optax.chain(clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer
