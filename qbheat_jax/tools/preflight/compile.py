"""Compile the train step or the forward pass ahead of time from shapes, without arrays and the target's devices."""

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
    """A config's train step or forward pass on a mesh, before tracing.

    Attributes:
      config: The checked config.
      objective: The method.
      mesh: `jax.sharding.Mesh`.
      function: The jitted step.
      state: Pytree of `jax.ShapeDtypeStruct` with shardings.
      batch: Dict of `jax.ShapeDtypeStruct` with shardings.
      inference: Whether it is a forward pass.
    """

    config: Any
    objective: Any
    mesh: Any
    function: Any
    state: Any
    batch: Any
    inference: bool = False

    @property
    def parameters(self):
        """The number of parameters."""
        return pytree.count(self.state.params)

    def state_bytes(self):
        """Return the bytes of the state per device: parameters, optimizer, averages and statistics."""
        return _local_bytes(self.state)

    def argument_bytes(self):
        """Return the bytes of a step's arguments per device: state and batch."""
        return self.state_bytes() + _local_bytes(self.batch)

    def trace(self):
        """Return the traced step."""
        return self.function.trace(self.state, self.batch)

    def min_traffic_bytes(self):
        """Return the least HBM traffic of a step per device, in bytes.

        The activations that the gradient needs, the state and the gradients are written once and read once. The batch is
        only read. A forward pass only reads its weights and its batch.
        """
        if self.inference:
            return self.argument_bytes()

        def loss(params, batch_stats, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return self.objective.loss(params, batch_stats, batch, rng.root(0))

        needed = min_traffic.activations(loss, self.state.params, self.state.batch_stats, self.batch) // self.mesh.size
        kept = _local_bytes(self.state) + _local_bytes(self.state.params)
        return 2 * (needed + kept) + _local_bytes(self.batch)


def _local_bytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def build(config, devices, room=math.inf, plain=False, lr_multipliers=None, inference=False):
    """Build the `Step` of a config.

    Args:
      config: A checked config.
      devices: List of devices.
      room: Memory of each device in bytes.
      plain: Argument of `state.train_step`.
      lr_multipliers: Argument of `optim.optimizer`.
      inference: Build the forward pass of `methods.forward` instead of the train step.

    Returns:
      The `Step`.

    Raises:
      UserError: Config and devices do not fit each other, or a step's arguments alone exceed `room`.
    """
    mesh = device_mesh.make_mesh(config.mesh, devices)
    objective = methods.build(config, optim.run_schedule(config))
    sharding.check_batch(config.batch_size, objective, mesh, config.accumulate)
    sharding.check_heads(objective, mesh)
    if getattr(objective, "head", ()) is None:
        raise UserError(
            f"config field head.classes={config.head.classes} is not accepted: preflight opens no data, so set the number "
            "of classes, as in --config.head.classes 1000"
        )
    shapes = objective.batch_spec(config).shapes(config.batch_size)
    batches = jax.sharding.NamedSharding(mesh, device_mesh.BATCH)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batches), shapes)
    _check_room(0, _local_bytes(batch), room)  # checked first, since a huge image also has a huge position code
    # The run's length does not change the step.
    schedule = optax.warmup_cosine_decay_schedule(0.0, optim.peak_learning_rate(config), 1, 2)
    optimizer = optim.optimizer(config, schedule, lr_multipliers)
    abstract = state.abstract(objective, optimizer, shapes, config.ema)
    if inference:
        params = {part: tree for part, tree in abstract.params.items() if part in ("encoder", "head")}
        abstract, batch = abstract.replace(params=params, opt_state={}, ema={}), {"image": batch["image"]}
    shardings = sharding.shardings(abstract, mesh, like_params=objective.sharded_like_params)
    sharding.check_split(shardings, mesh)
    if inference:
        function = _forward(objective, shardings, mesh)
    else:
        function = state.train_step(
            objective, optimizer, rng.root(config.seed), shardings, mesh, config.ema, config.accumulate, plain
        )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    _check_room(_local_bytes(abstract), _local_bytes(batch), room)
    return Step(config, objective, mesh, function, abstract, batch, inference)


def _forward(objective, shardings, mesh):
    """Return the jitted `forward(state, batch)` -> logits or features, see `methods.forward`."""

    def forward(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            images = sharding.spread(batch, objective, mesh)["image"]
            return methods.forward(objective, state.variables(), images)

    batches = jax.sharding.NamedSharding(mesh, device_mesh.BATCH)
    return jax.jit(forward, in_shardings=(shardings, batches), out_shardings=batches)


def _check_room(state, batch, room):
    if state + batch <= room:
        return
    remedy = (
        "split the state over more devices with mesh.fsdp, or use a smaller model or larger chips"
        if state > batch
        else "use a smaller batch_size or image_size, or more devices"
    )
    raise UserError(
        f"a step's arguments need {(state + batch) / GIB:.1f} GiB per device ({state / GIB:.1f} for the state, "
        f"{batch / GIB:.1f} for the batch), but a device has {room / GIB:.0f} GiB: {remedy}"
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Result of compiling a step, in types that JSON can hold.

    Attributes:
      text: The program's HLO; "" without a program.
      memory: {name: bytes} per device, see `_memory`; empty without a program.
      seconds: Time of lowering and compilation.
      refusal: The compiler's message for a program that does not fit; else "".
      error: Reason for a failure of the compiler itself; else "".
      note: Remark for the report on how it was compiled; else "".
    """

    text: str = ""
    memory: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    refusal: str = ""
    error: str = ""
    note: str = ""


def compile(traced, options=None):
    """Compile a traced step.

    Args:
      traced: Result of `Step.trace`.
      options: {name: value} of XLA's options for this program.

    Returns:
      A `Compiled`. If the program is too large for the chip, its `refusal` is the reason.

    Raises:
      jax.errors.JaxRuntimeError: Any other failure of the compiler.
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
    """Return the compiler's out-of-memory message, with its sizes, on one line.

    >>> refusal("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.2G of 15.75G hbm.\\n\\nProgram: ...")
    'RESOURCE_EXHAUSTED: Ran out of memory. Used 17.2G of 15.75G hbm.'
    """
    return re.split(r"\n\s*\n|\n(?=Total|Program|Largest)", text.strip())[0].replace("\n", " ")


def _memory(program):
    figures = program.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: getattr(figures, f"{name}_size_in_bytes") for name in names}
