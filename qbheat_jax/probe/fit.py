"""Heads trained on cached features, a grid of hyper-parameters at once as one batch of heads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qbheat_jax import rng as rng_lib
from qbheat_jax.optim import decay_mask
from qbheat_jax.probe.devices import pmap, pmap_batches, slices


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How heads are trained. learning_rates [G] and weight_decays [G] are paired: one head each."""

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


def fit(recipe, features, labels, seed, each_epoch=None):
    """Trains one head for each pair of the recipe's grid -> params with a leading axis [G, ...].

    features float32 [N, ...], labels int32 [N]. The heads share their start and the order of the examples; only the
    heads are differentiated, since features are all that enters. each_epoch(epoch, params, losses [G]) is called after
    each epoch; a learning rate that diverges leaves a head that is not chosen, not an error. `ridge` has no epochs.
    """
    if recipe.optimizer == "ridge":
        return ridge(features, labels, recipe.classes, recipe.weight_decays)
    n = len(features)
    size = min(recipe.batch_size, n)
    per_epoch = n // size
    steps = max(1, round(recipe.epochs * per_epoch))
    rates, decays = jnp.asarray(recipe.learning_rates), jnp.asarray(recipe.weight_decays)
    key = rng_lib.root(seed)
    params = recipe.head.init(rng_lib.fold(key, "head"), jnp.asarray(features[:1]))["params"]
    params = jax.tree.map(lambda p: jnp.repeat(p[None], len(rates), 0), params)

    def optimizer(rate, decay):
        return recipe._optimizer(rate, decay, steps, per_epoch)

    opt_state = jax.vmap(lambda r, d, p: optimizer(r, d).init(p))(rates, decays, params)

    def loss(params, x, y, key):
        dropout, drop_path = jax.random.split(key)
        logits = recipe.head.apply({"params": params}, x, True, rngs={"dropout": dropout, "drop_path": drop_path})
        target = optax.smooth_labels(jax.nn.one_hot(y, recipe.classes), recipe.label_smoothing)
        return optax.softmax_cross_entropy(logits, target).mean()

    def one(rate, decay, params, opt_state, x, y, key):
        value, gradient = jax.value_and_grad(loss)(params, x, y, key)
        updates, opt_state = optimizer(rate, decay).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def epoch(params, opt_state, x, y, order, key):
        def step(carry, batch):
            rows, key = batch
            carry_params, carry_state, value = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None, None))(
                rates, decays, *carry, x[rows], y[rows], key
            )
            return (carry_params, carry_state), value

        (params, opt_state), values = jax.lax.scan(
            step, (params, opt_state), (order, jax.random.split(key, len(order)))
        )
        return params, opt_state, values.mean(0)

    x, y = jnp.asarray(features), jnp.asarray(labels)
    for number in range(-(-steps // per_epoch)):
        order = np.random.default_rng((seed, number)).permutation(n)[: per_epoch * size].reshape(per_epoch, size)
        order = order[: steps - number * per_epoch]  # a last epoch may be a part of one
        epoch_key = rng_lib.fold(key, "epoch", number)
        params, opt_state, values = epoch(params, opt_state, x, y, order, epoch_key)
        if each_epoch:
            each_epoch(number + 1, params, np.asarray(values))
    return params


def ridge(features, labels, classes, strengths):
    """Least squares on one-hot targets in closed form, one linear head for each strength -> params of LinearHead [G, ...].

    Minimises mean |x W + b - y|^2 + strength |W|^2, in float64. features [N, C], labels int [N], strengths [G] above 0.
    """
    x, y = np.asarray(features, np.float64), np.eye(classes)[np.asarray(labels)]
    centre, share = x.mean(0), y.mean(0)
    x, y = x - centre, y - share
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    kernels = [np.linalg.solve(gram + strength * np.eye(len(gram)), moment) for strength in strengths]
    biases = [share - centre @ kernel for kernel in kernels]
    return {"classifier": {"kernel": np.stack(kernels).astype(np.float32), "bias": np.stack(biases).astype(np.float32)}}


@functools.lru_cache(maxsize=8)
def _scorer(head, devices):
    """The pmapped (params [G, ...], x [B, ...]) -> logits [B, G, classes]. Compiled once for a head, not once an epoch."""
    del devices  # only part of the key: what was mapped over other devices cannot be used again

    def logits(params, x):
        return jax.vmap(lambda p: head.apply({"params": p}, x), out_axes=1)(params)

    return pmap(logits)


def accuracy(recipe, params, features, labels):
    """{"top1": float64[G], "top5": float64[G]}: shares of 1 for each head, through the pmap loop."""
    mapped = _scorer(recipe.head, tuple(jax.local_devices()))
    batches = pmap_batches(mapped, params, slices(features, recipe.batch_size))
    scores = np.concatenate([np.nan_to_num(b, nan=-np.inf) for b in batches])  # [N, G, classes]
    right = np.take_along_axis(scores, np.asarray(labels)[:, None, None], 2)  # [N, G, 1]
    # Ties count against the head: one that says the same of all classes is not right about any.
    rank = (scores >= right).sum(2) - 1
    return {"top1": (rank < 1).mean(0), "top5": (rank < min(5, recipe.classes)).mean(0)}
