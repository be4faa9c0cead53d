"""Train heads on features, one head for each hyper-parameter setting, all as one batch; choose the best one."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qbheat_jax import rng as rng_lib
from qbheat_jax.eval import accuracy
from qbheat_jax.probe.features import slices
from qbheat_jax.probe.pmap import pmap, pmap_batches
from qbheat_jax.train.optim import decay_mask

log = logging.getLogger("qbheat")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How heads are trained. learning_rates [G] and weight_decays [G] are paired, one head for each pair."""

    head: Any
    classes: int
    learning_rates: tuple
    weight_decays: tuple
    optimizer: str
    momentum: float
    epochs: float
    warmup_epochs: float
    batch_size: int
    label_smoothing: float

    def target(self, labels):
        """Return (target probabilities float32 [..., classes], weight of each loss float32 [...]) of labels int32 [...]."""
        target = optax.smooth_labels(jax.nn.one_hot(labels, self.classes), self.label_smoothing)
        return target, jnp.ones(labels.shape)

    def _optimizer(self, learning_rate, weight_decay, steps, steps_an_epoch):
        peak = learning_rate * self.batch_size / 256
        warmup = min(round(self.warmup_epochs * steps_an_epoch), steps - 1)
        cosine = optax.cosine_decay_schedule(1.0, steps)
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps) if warmup > 0 else cosine

        def rate(step):
            return peak * schedule(step)

        if self.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=weight_decay, mask=decay_mask)
        if self.optimizer == "lars":
            return optax.lars(
                rate,
                weight_decay=weight_decay,
                weight_decay_mask=decay_mask,
                trust_ratio_mask=decay_mask,
                momentum=self.momentum,
            )
        decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
        return optax.chain(decay, optax.sgd(rate, momentum=self.momentum))


def fit(recipe, examples, seed, each_epoch=None):
    """Train one head for each pair of the recipe's grid. Return params with a leading axis [G, ...].

    The heads share their initial weights and the order of examples. Gradients reach the heads alone. A diverged learning rate
    raises no error; its head is not chosen. `ridge` has no epochs.

    Args:
      recipe: Recipe.
      examples: `features.Features`, or an object with its length, `shape` and `epoch`.
      seed: int.
      each_epoch: called with (epoch, params, losses [G]) after each epoch, or None.
    """
    if recipe.optimizer == "ridge":
        return ridge(examples, recipe.classes, recipe.weight_decays)
    size = min(recipe.batch_size, len(examples))
    per_epoch = len(examples) // size
    steps = max(1, round(recipe.epochs * per_epoch))
    key = rng_lib.root(seed)
    state, train = _trainer(recipe, examples.shape, steps, per_epoch, key)
    done = 0
    for number in range(-(-steps // per_epoch)):
        losses = []
        for x, labels, weights, rows in examples.epoch(seed, number, size, min(per_epoch, steps - done)):
            state, values = train(state, x, labels, weights, rows, np.arange(done, done + len(rows)))
            losses.append(values)
            done += len(rows)
        if each_epoch:
            each_epoch(number + 1, state[0], np.concatenate(losses).mean(0))
    return state[0]


def choose(recipe, examples, seed, score, figure, always=True):
    """Train the heads of a grid and return the one with the best score.

    Args:
      recipe, examples, seed: as of `fit`.
      score: function of params [G, ...] to the scores float [G] on held-out examples; higher is better.
      figure: the score's name in metrics.
      always: whether to score after every epoch, for the curve; otherwise only the trained heads.

    Returns:
      ((learning rate, weight decay), params [1, ...], its score, list of metric lines).
    """
    epochs = []

    def note(epoch, params, losses):
        epochs.append([epoch, losses, score(params) if always else None])

    params = fit(recipe, examples, seed, note)
    last = epochs[-1][2] if epochs and always else score(params)
    if epochs:
        epochs[-1][2] = last
    best = int(np.argmax(last))
    rates = recipe.learning_rates
    if len(set(rates)) > 2 and rates[best] in (min(rates), max(rates)):
        log.warning("the best learning rate, %g, is at the edge of those tried: try others beyond it", rates[best])
    curve = []
    for epoch, losses, scores in epochs:
        curve.append({"step": epoch, "probe/loss": float(losses[best])})
        if scores is not None:
            curve[-1][f"probe/holdout_{figure}"] = float(scores[best])
    chosen = jax.tree.map(lambda leaf: leaf[best : best + 1], params)
    return (rates[best], recipe.weight_decays[best]), chosen, float(last[best]), curve


def _trainer(recipe, shape, steps, per_epoch, key):
    """Return (state, train) of a grid of heads.

    train(state, x, labels, weights, rows int [k, B], numbers int [k]) runs k steps and returns (state, losses [k, G]). Batch j
    has rows[j] of x, labels and weights, and the random numbers of step numbers[j].
    """
    rates, decays = jnp.asarray(recipe.learning_rates), jnp.asarray(recipe.weight_decays)
    params = recipe.head.init(rng_lib.fold(key, "head"), jnp.zeros((1, *shape)))["params"]
    params = jax.tree.map(lambda p: jnp.repeat(p[None], len(rates), 0), params)

    def optimizer(rate, decay):
        return recipe._optimizer(rate, decay, steps, per_epoch)

    def loss(params, x, y, weight, key):
        dropout, drop_path = jax.random.split(key)
        logits = recipe.head.apply({"params": params}, x, True, rngs={"dropout": dropout, "drop_path": drop_path})
        target, own = recipe.target(y)
        weight = own * weight.reshape(-1, *[1] * (own.ndim - 1))
        return (optax.softmax_cross_entropy(logits, target) * weight).sum() / jnp.maximum(weight.sum(), 1.0)

    def one(rate, decay, params, opt_state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer(rate, decay).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    heads = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None, None, None))

    @jax.jit
    def train(state, x, labels, weights, rows, numbers):
        def step(carry, batch):
            rows, number = batch
            step_key = rng_lib.fold(key, "step", number)
            params, opt_state, value = heads(rates, decays, *carry, x[rows], labels[rows], weights[rows], step_key)
            return (params, opt_state), value

        return jax.lax.scan(step, state, (rows, numbers))

    return (params, jax.vmap(lambda r, d, p: optimizer(r, d).init(p))(rates, decays, params)), train


def ridge(features, classes, strengths):
    """Return params [G, ...] of LinearHead by ridge regression on one-hot targets, one head for each strength.

    They minimise mean |x W + b - y|^2 + strength |W|^2, in float64.

    Args:
      features: `Features` of vectors [C].
      classes: int.
      strengths: [G], above 0.
    """
    n, target = len(features), np.eye(classes)
    centre = sum(x.sum(0, dtype=np.float64) for _, x in features.blocks()) / n
    share = np.bincount(features.labels, minlength=classes) / n
    gram, moment = 0.0, 0.0
    for block, x in features.blocks():
        x = x - centre
        gram, moment = gram + x.T @ x / n, moment + x.T @ (target[features.labels[block]] - share) / n
    kernels = [np.linalg.solve(gram + strength * np.eye(len(gram)), moment) for strength in strengths]
    biases = [share - centre @ kernel for kernel in kernels]
    return {"classifier": {"kernel": np.stack(kernels).astype(np.float32), "bias": np.stack(biases).astype(np.float32)}}


@functools.lru_cache(maxsize=8)
def _scorer(head, devices):
    """Return the pmapped (params [G, ...], x [B, ...]) -> logits [B, G, classes], compiled once for a head."""
    del devices  # part of the cache's key: a pmapped function belongs to its devices

    def logits(params, x):
        return jax.vmap(lambda p: head.apply({"params": p}, x), out_axes=1)(params)

    return pmap(logits)


def ranks(recipe, params, features):
    """Return the rank of the true class under each head (`accuracy.ranks`), int [N, G]."""
    mapped = _scorer(recipe.head, tuple(jax.local_devices()))
    size = recipe.batch_size
    batches = (batch for _, x in features.blocks(size) for batch in slices(x, size))
    parts = pmap_batches(mapped, params, batches)
    begins = range(0, len(features), size)
    return np.concatenate([accuracy.ranks(p, features.labels[b : b + size]) for p, b in zip(parts, begins)])
