"""Durations in steps, learning-rate schedules, and the optimizer chain with its decay mask."""

import math

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.errors import UserError
from qbheat_jax.methods import Schedule


def duration(config, name, total_steps, examples):
    """A duration of the config in steps. `examples`: images in an epoch.

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
    """The length of the run in steps, from whichever of total_steps and total_epochs is set."""
    if config.total_steps is not None:
        return config.total_steps
    # The small number: 0.29 epochs of 100 images are 29 steps, though the product of the floats is a little less.
    return max(1, math.floor(config.total_epochs * examples / config.batch_size + 1e-9))


def run_schedule(config, examples=None):
    """Return the `methods.Schedule` of a run. examples: images in an epoch; None where no data has been opened."""
    known = examples is not None
    return Schedule(
        total_steps=total_steps(config, examples) if known or config.total_steps is not None else None,
        steps_per_epoch=examples / config.batch_size if known else None,
    )


def peak_learning_rate(config):
    """learning_rate is for 256 examples and grows with the batch (method: base lr x batch / 256)."""
    return config.learning_rate * config.batch_size / 256


def schedule(config, steps, examples):
    """Step -> learning rate: linear warm-up from 0, then a cosine to 0 at the last step."""
    warmup = duration(config, "warmup", steps, examples)
    if warmup >= steps:
        raise UserError(f"warmup is {warmup} steps, but the run has {steps}: it must be shorter than the run")
    if not warmup:
        return optax.cosine_decay_schedule(peak_learning_rate(config), steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak_learning_rate(config), warmup, steps)


def decay_mask(params):
    """True for what weight decay applies to: kernels and matrices, not biases, norms and other vectors."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def global_norm(tree):
    """The norm of all numbers of a tree of arrays together -> float32 scalar."""
    return jax.lax.platform_dependent(tree, cuda=_norm_of_rows, default=optax.tree.norm)


def _norm_of_rows(tree):
    """The norm of the norms of all rows, leaf by leaf: for a sum over each whole leaf a GPU takes two kernels a leaf."""
    rows = [jnp.sqrt(jnp.square(x).sum(-1)).reshape(-1) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.square(jnp.concatenate(rows)).sum())


def clip_by_global_norm(most):
    """optax.clip_by_global_norm by `global_norm`, so that a step that reports the norm as well computes it once."""

    def clip(updates, _):
        norm = global_norm(updates)
        return jax.tree.map(lambda x: jax.lax.select(norm < most, x, (x / norm.astype(x.dtype)) * most), updates)

    return optax.stateless(clip)


def adamw(config, schedule, lr_multipliers=None):
    """AdamW under a schedule, gradients clipped before it where clip_norm is set -> optax transformation.

    lr_multipliers: function of the parameters' tree to a tree of numbers, each of which multiplies its leaf's learning rate.
    """
    optimizer = optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if lr_multipliers is not None:
        scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, lr_multipliers(updates)))
        optimizer = optax.chain(optimizer, scale)
    if config.clip_norm:
        return optax.chain(clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer
