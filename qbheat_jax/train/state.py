"""Train state, sharded as it is made, and the one train step of every method."""

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
    """Everything that a step changes.

    `batch_stats` is the method's state, named as in every checkpoint. `ema` is an average of `params`; {} for none.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def variables(self):
        """Return the variables to evaluate: {"params": the average where there is one, "batch_stats"}."""
        return {"params": self.ema or self.params, "batch_stats": self.batch_stats}


def abstract(method, optimizer, batch, ema=0.0):
    """Return the state's shapes and dtypes. batch: {name: ShapeDtypeStruct}. Nothing is computed."""
    return jax.eval_shape(initialiser(method, optimizer, batch, ema), rng_lib.root(0))


def create(method, optimizer, batch, key, mesh, ema=0.0):
    """Return (state, shardings). Parameters are computed on the devices that hold them, never whole on one of them.

    Their random bits are whole: four bytes a parameter, while the program runs. batch: {name: ShapeDtypeStruct}.
    """
    init = initialiser(method, optimizer, batch, ema)
    shardings = sharding.shardings(jax.eval_shape(init, key), mesh, like_params=method.sharded_like_params)
    return jax.jit(init, out_shardings=shardings)(rng_lib.fold(key, "init")), shardings


def initialiser(method, optimizer, batch, ema=0.0):
    """Return `init(key) -> TrainState`. batch: {name: ShapeDtypeStruct}."""

    def variables_of(key):
        return method.init(key, {name: jnp.zeros(x.shape, x.dtype) for name, x in batch.items()})

    make = initial.in_one_draw(variables_of)

    def init(key):
        variables = make(key)
        params = variables["params"]
        # A copy, since the step donates the state and no buffer may be donated twice.
        average = jax.tree.map(jnp.copy, params) if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params), average)

    return init


def load_params(state, variables):
    """Return the state with the parts of {"params": {part: tree}, "batch_stats": ...} loaded, sharded as before.

    Parameters whose name matches the pattern `variables["own"]`, if there is one, may be missing: they stay as they are.

    Raises UserError where a part's leaves or shapes differ from the state's.
    """

    def replaced(tree, parts, name):
        if variables.get("own"):
            parts = pytree.filled(parts, {part: tree[part] for part in parts}, variables["own"])
        wrong = pytree.differences({part: tree.get(part, {}) for part in parts}, parts)
        if wrong:
            raise UserError(
                f"the weights to start from are of another model: {wrong[0]} of {name} ({len(wrong)} differ)"
            )

        # Copies of the caller's arrays, since the step donates the state.
        def placed(old, x):
            return old if x is old else jax.device_put(np.array(x, old.dtype), old.sharding)

        return {**tree, **jax.tree.map(placed, {p: tree[p] for p in parts}, parts)}

    params = replaced(state.params, variables["params"], "params")
    ema = replaced(state.ema, variables["params"], "ema") if state.ema else {}
    stats = replaced(state.batch_stats, variables.get("batch_stats", {}), "batch_stats")
    return dataclasses.replace(state, params=params, ema=ema, batch_stats=stats)


def train_step(method, optimizer, key, shardings, mesh, ema=0.0, accumulate=1, plain=False):
    """Return the jitted `step(state, batch) -> (state, metrics)`; the state is donated.

    Random numbers come from the run's key folded with the step, so a resumed run repeats an uninterrupted one. Metrics are
    float32 scalars on the device: `loss`, `grad_norm` and the method's own.

    Args:
      method: See `methods.base.Method`.
      optimizer: optax transformation.
      key: Root key of the run.
      shardings: Of the state.
      mesh: Device mesh.
      ema: Decay of the average of the parameters; 0: none.
      accumulate: Number of equal parts that the batch goes through in, one after the other, in the memory of one part. Loss
        and gradient are those of the whole batch up to rounding, since parts weigh by the examples that count. Batch norm
        sees one part at a time and updates its running statistics part by part; random numbers are drawn for each part;
        other metrics are means over the parts.
      plain: Leave out what is computed twice for the hardware's sake (`layers.attend`), to count FLOPs rather than to run.
    """

    def loss(params, batch_stats, batch, key):
        with contextlib.nullcontext() if plain else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return method.loss(params, batch_stats, sharding.spread(batch, method, mesh), key)

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
    """Return `gradient(params, batch_stats, batch, key) -> ((loss, (batch_stats, metrics)), gradients)`, a part at a time.

    shardings: of the parameters and of the summed gradients.
    """

    def summed(params, batch_stats, batch, key):
        # Every count-th row, so that each device holds its share of every part.
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


def evaluate(method, variables, batch):
    """Return {"loss", ..., "count"}: the method's metrics over the examples of a batch that count, and their number."""
    loss, (_, metrics) = method.loss(variables["params"], variables["batch_stats"], batch, None, train=False)
    return {"loss": loss, **metrics, "count": batch["mask"].sum()}
