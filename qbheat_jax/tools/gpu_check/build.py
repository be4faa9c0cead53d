"""Make arrays and train steps for the jobs, on the host, because compiling an initialiser can take longer than a step."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from qbheat_jax import pytree
from qbheat_jax.tools.bench import timing, training
from qbheat_jax.tools.preflight import compile as compile_lib


def variables(shapes):
    """Return deterministic float32 arrays for a tree of shapes.

    Batch norms get scales of about 0.5 and biases of about 1, which keeps most ReLU inputs away from zero. Near zero,
    rounding flips a ReLU, and the gradients of two correct programs differ as much as their size.

    Args:
      shapes: {"params": ..., "batch_stats": ...} of `jax.ShapeDtypeStruct`.

    Returns:
      The same tree of float32 numpy arrays.
    """
    draw = np.random.default_rng(0)
    norms = {name.rpartition("/")[0] for name, _ in pytree.names(shapes.get("batch_stats", {}))}

    def leaf(name, shape):
        size, (parent, _, last) = shape.shape, name.partition("/")[2].rpartition("/")
        if last in ("mean", "var"):
            return np.full(size, float(last == "var"), np.float32)
        if len(size) > 1:
            values = draw.normal(size=size) / np.sqrt(np.prod(size[:-1]))
        else:
            values = 0.1 * draw.normal(size=size)
            if last == "scale":
                values = (1 + values) * (0.5 if parent in norms else 1)
            elif parent in norms:
                values = 1 + values
        return values.astype(np.float32)

    return pytree.map_with_names(leaf, shapes)


@dataclasses.dataclass
class Step:
    """A config's compiled train step on the first device, with its state and a batch of noise.

    Attributes:
      objective: The method, with its encoder.
      variables: Initial variables on the host.
      batch: Dict of numpy arrays.
      traced: The traced step, for `matmul_flops`.
      program: The compiled step.
      seconds: {"trace": seconds, "compile": seconds}.
      state: Current state on the device.
      placed: The batch on the device.
      metrics: Metrics of the last step.
    """

    objective: Any
    variables: Any
    batch: dict
    traced: Any
    program: Any
    seconds: dict
    state: Any
    placed: Any
    metrics: Any = None

    def send(self):
        """Send one step to the device."""
        self.state, self.metrics = self.program(self.state, self.placed)

    def wait(self):
        """Wait for all steps and return the loss of the last one."""
        jax.block_until_ready(self.state)
        return float(self.metrics["loss"])


def step(config):
    """Return the `Step` of a checked config."""
    built = compile_lib.build(config, jax.devices()[:1])
    filled = variables({"params": built.state.params, "batch_stats": built.state.batch_stats})
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.state)
    state = dataclasses.replace(state, **filled)
    began = time.perf_counter()
    traced = built.trace()
    lowered, middle = traced.lower(), time.perf_counter()
    program = lowered.compile()
    seconds = {"trace": middle - began, "compile": time.perf_counter() - middle}
    batch = training.noise(config)
    placed = {name: jax.device_put(x, built.batch[name].sharding) for name, x in batch.items()}
    state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), state, built.state)
    return Step(built.objective, filled, batch, traced, program, seconds, state, placed)


def sent(send, wait):
    """Return a step's `run` function for `timing.alternate`, which sends all steps before it waits for the last."""
    return timing.repeated(send, lambda _: wait(), ahead=True)
