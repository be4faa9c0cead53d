"""The real train step, compiled ahead of time from shapes: no array is made, no device of the target is needed."""

import dataclasses
import logging
import math
import re
import time
from typing import Any

import jax
import optax

from qbheat_jax import device_mesh, methods, pytree, rng
from qbheat_jax.errors import UserError
from qbheat_jax.tools.preflight import min_traffic
from qbheat_jax.train import optim, sharding, state

GIB = 2**30

log = logging.getLogger("qbheat")


@dataclasses.dataclass(frozen=True)
class Step:
    """A config's train step on a mesh, not yet traced. `state` and `batch` are trees of shapes with their shardings."""

    config: Any
    objective: Any
    mesh: Any
    function: Any
    state: Any
    batch: Any

    @property
    def parameters(self):
        return pytree.count(self.state.params)

    def state_bytes(self):
        """What one device keeps of the state: parameters, optimizer, averages, statistics."""
        return _local_bytes(self.state)

    def argument_bytes(self):
        """State and batch together, what one device is given for a step."""
        return self.state_bytes() + _local_bytes(self.batch)

    def trace(self):
        return self.function.trace(self.state, self.batch)

    def least_bytes(self):
        """What one device moves through HBM at the least: what the gradient needs, the state, the gradients, the batch.

        Each is written once and read once, but for the batch, which is read.
        """

        def loss(params, batch_stats, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return self.objective.loss(params, batch_stats, batch, rng.root(0))

        needed = min_traffic.activations(loss, self.state.params, self.state.batch_stats, self.batch) // self.mesh.size
        kept = _local_bytes(self.state) + _local_bytes(self.state.params)
        return 2 * (needed + kept) + _local_bytes(self.batch)


def _local_bytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def build(config, devices, room=math.inf, plain=False, lr_multipliers=None):
    """The Step of a checked config on these devices, each with `room` bytes of memory. `plain`: as of `state.train_step`;
    `lr_multipliers`: as of `optim.adamw`.

    Raises UserError where they do not go together, or where not even what a device is given for a step has room.
    """
    mesh = device_mesh.make_mesh(config.mesh, devices)
    objective = methods.build(config, optim.run_schedule(config))
    sharding.check_batch(config.batch_size, objective, mesh, config.accumulate)
    sharding.check_heads(objective, mesh)
    if getattr(objective, "head", ()) is None:
        raise UserError(
            f"config field head.classes={config.head.classes} is not accepted here: preflight opens no data, so it "
            "must be told how many classes they have, such as --config.head.classes 1000"
        )
    shapes = objective.batch_spec(config).shapes(config.batch_size)
    batches = jax.sharding.NamedSharding(mesh, device_mesh.BATCH)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batches), shapes)
    _check_room(0, _local_bytes(batch), room)  # first, since the position code of too large an image is large itself
    # How long the run is does not change what a step does.
    schedule = optax.warmup_cosine_decay_schedule(0.0, optim.peak_learning_rate(config), 1, 2)
    optimizer = optim.adamw(config, schedule, lr_multipliers)
    abstract = state.abstract(objective, optimizer, shapes, config.ema)
    shardings = sharding.shardings(abstract, mesh, like_params=objective.sharded_like_params)
    sharding.check_split(shardings, mesh)
    function = state.train_step(
        objective, optimizer, rng.root(config.seed), shardings, mesh, config.ema, config.accumulate, plain
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    _check_room(_local_bytes(abstract), _local_bytes(batch), room)
    return Step(config, objective, mesh, function, abstract, batch)


def _check_room(state, batch, room):
    if state + batch <= room:
        return
    advice = (
        "split it over more devices with mesh.fsdp, or take a smaller model or larger chips"
        if state > batch
        else "take a smaller batch_size or image_size, or more devices"
    )
    raise UserError(
        f"before it computes anything a device would need {(state + batch) / GIB:.1f} GiB, {state / GIB:.1f} for state "
        f"and {batch / GIB:.1f} for images, and has {room / GIB:.0f}: {advice}"
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step, plain enough to go into JSON.

    Args:
      text: The program's HLO, "" where there is none.
      memory: {name: bytes} of one device, as of `_memory`, empty where there is no program.
      seconds: Lowering and compilation.
      refusal: Why the program does not fit, in the compiler's words; "" where it fits or the compiler does not say.
      error: Why there is no program though it might fit: the compiler failed.
      note: What a reader must know of how it was compiled.
    """

    text: str = ""
    memory: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    refusal: str = ""
    error: str = ""
    note: str = ""


def compile(traced, options=None):
    """Compile a traced step. A program too large for the chip is a result; other errors are raised.

    Args:
      traced: As of `Step.trace`.
      options: XLA's options by their names, for this program alone.
    """
    started = time.perf_counter()
    lowered = traced.lower()
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(seconds=time.perf_counter() - started, refusal=refusal(str(error)))
    seconds = time.perf_counter() - started
    return Compiled(program.as_text(), _memory(program), seconds)


def refusal(text):
    """The compiler's account of what does not fit, on one line with its sizes.

    >>> refusal("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.2G of 15.75G hbm.\\n\\nProgram: ...")
    'RESOURCE_EXHAUSTED: Ran out of memory. Used 17.2G of 15.75G hbm.'
    """
    return re.split(r"\n\s*\n|\n(?=Total|Program|Largest)", text.strip())[0].replace("\n", " ")


def _memory(program):
    figures = program.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: getattr(figures, f"{name}_size_in_bytes") for name in names}
