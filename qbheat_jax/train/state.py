"""The train state, born sharded, and the one train step of every objective."""

import contextlib
import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qbheat_jax import device_mesh, pytree
from qbheat_jax import rng as rng_lib
from qbheat_jax.errors import UserError
from qbheat_jax.train import initial, optim, sharding


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `ema` is an average of `params`, or an empty dict where there is none."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def variables(self):
        """What is evaluated: {"params": the average where there is one, "batch_stats"}."""
        return {"params": self.ema or self.params, "batch_stats": self.batch_stats}


def abstract(objective, optimizer, batch, ema=0.0):
    """The state's shapes and dtypes; nothing is computed. `batch` gives shapes and dtypes alone."""
    return jax.eval_shape(initialiser(objective, optimizer, batch, ema), rng_lib.root(0))


def create(objective, optimizer, batch, key, mesh, ema=0.0):
    """(state, shardings): parameters are computed on the devices that will hold them, never whole on one of them.

    The random bits that they follow from are: four bytes for each parameter, for as long as the program runs.
    `batch` gives shapes and dtypes alone.
    """
    init = initialiser(objective, optimizer, batch, ema)
    shardings = sharding.shardings(jax.eval_shape(init, key), mesh, like_params=objective.sharded_like_params)
    return jax.jit(init, out_shardings=shardings)(rng_lib.fold(key, "init")), shardings


def initialiser(objective, optimizer, batch, ema=0.0):
    """The program that makes the state: `init(key) -> TrainState`. `batch` gives shapes and dtypes alone."""

    def variables_of(key):
        return objective.init(key, {name: jnp.zeros(x.shape, x.dtype) for name, x in batch.items()})

    make = initial.in_one_draw(variables_of)

    def init(key):
        variables = make(key)
        params = variables["params"]
        # A copy: the step donates the state, and no buffer may be donated twice.
        average = jax.tree.map(jnp.copy, params) if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params), average)

    return init


def load_params(state, variables):
    """The state with the parts of {"params": {part: tree}, "batch_stats": ...} in the place of its own, sharded as those.

    Raises UserError where a part has other leaves or shapes than the state's.
    """

    def replaced(tree, parts, name):
        wrong = pytree.differences({part: tree.get(part, {}) for part in parts}, parts)
        if wrong:
            raise UserError(
                f"the weights to start from are of another model: {wrong[0]} of {name} ({len(wrong)} differ)"
            )
        # Not the caller's arrays but copies: the step donates the state.
        new = jax.tree.map(
            lambda old, x: jax.device_put(np.array(x, old.dtype), old.sharding), {p: tree[p] for p in parts}, parts
        )
        return {**tree, **new}

    params = replaced(state.params, variables["params"], "params")
    ema = replaced(state.ema, variables["params"], "ema") if state.ema else {}
    stats = replaced(state.batch_stats, variables.get("batch_stats", {}), "batch_stats")
    return dataclasses.replace(state, params=params, ema=ema, batch_stats=stats)


def train_step(objective, optimizer, key, shardings, mesh, ema=0.0, accumulate=1, plain=False):
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated.

    Random numbers come from the run's key folded with the step, so a resumed run repeats an uninterrupted one. Metrics
    are float32 scalars on the device: `loss`, `grad_norm`, and the objective's own.

    accumulate: how many equal parts the batch goes through in, one after the other, which takes the memory of one of them.
    Loss and gradient are those of the whole batch up to rounding: parts weigh by their examples that count. What is not
    the same: batch norm sees a part at a time, and its running statistics are updated by one after the other; what is
    drawn at random within a step is drawn for each part; `variance` and other metrics are the parts' means.

    plain: without what is computed twice for a chip's sake (`layers.attend`), which is to be counted rather than run.
    """

    def loss(params, batch_stats, batch, key):
        with contextlib.nullcontext() if plain else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return objective.loss(params, batch_stats, sharding.spread(batch, objective, mesh), key)

    compute = jax.value_and_grad(loss, has_aux=True)
    if accumulate > 1:
        compute = _in_parts(compute, accumulate, shardings.params, mesh)

    def step(state, batch):
        step_key = rng_lib.fold(key, "train", state.step)
        (value, (batch_stats, metrics)), gradients = compute(state.params, state.batch_stats, batch, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.ema, 1.0 - ema) if ema else {}
        metrics = {"loss": value, "grad_norm": optim.global_norm(gradients), **metrics}
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    whole = NamedSharding(mesh, PartitionSpec())
    batches = NamedSharding(mesh, device_mesh.BATCH)
    return jax.jit(step, in_shardings=(shardings, batches), out_shardings=(shardings, whole), donate_argnums=0)


def _in_parts(gradient, count, shardings, mesh):
    """`gradient(params, batch_stats, batch, key) -> ((loss, (batch_stats, metrics)), gradients)`, a part at a time.

    shardings: of the parameters, which the sum of the gradients is kept in as well.
    """

    def summed(params, batch_stats, batch, key):
        # Every count-th row: whatever device holds rows of the batch, it holds its share of each part.
        parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, *device_mesh.BATCH)))
        weights = parts["mask"].sum(1) / jnp.maximum(batch["mask"].sum(), 1)
        each = (parts, weights, jax.random.split(key, count))

        def one(batch_stats, part):
            batch, weight, key = part
            (loss, (batch_stats, metrics)), gradients = gradient(params, batch_stats, batch, key)
            return batch_stats, jax.tree.map(lambda x: weight * x, (loss, metrics, gradients))

        def add(carry, part):
            batch_stats, sums = carry
            batch_stats, new = one(batch_stats, part)
            loss, metrics, gradients = jax.tree.map(jnp.add, sums, new)
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
            return (batch_stats, (loss, metrics, gradients)), None

        _, shapes = jax.eval_shape(one, batch_stats, jax.tree.map(lambda x: x[0], each))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (batch_stats, (loss, metrics, gradients)), _ = jax.lax.scan(add, (batch_stats, zeros), each)
        return (loss, (batch_stats, metrics)), gradients

    return summed


def evaluate(objective, variables, batch):
    """{"loss", ..., "count"}: the objective's figures over the examples of a batch that count, and their number."""
    loss, (_, metrics) = objective.loss(variables["params"], variables["batch_stats"], batch, None, train=False)
    return {"loss": loss, **metrics, "count": batch["mask"].sum()}
