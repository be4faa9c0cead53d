"""Save and restore checkpoints: state, data position and config together, written in the background by orbax.

WORKDIR/checkpoints/STEP/ holds everything needed to resume, including a bit sum for every array. A read that finds a
damaged file falls back to the previous checkpoint.
"""

import contextlib
import json
import logging

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from qbheat_jax import pytree
from qbheat_jax.errors import RUN_FAILED, UserError, first_line
from qbheat_jax.train import distributed, runtime
from qbheat_jax.train.orbax_threads import tidy_loops

log = logging.getLogger("qbheat")


@jax.jit
def _bit_sums(tree):
    """Return the uint32 sum of each leaf's bits, in the tree's structure; it is exact, so independent of the sharding."""

    def bits(leaf):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[leaf.dtype.itemsize]
        whole = leaf.astype(jnp.uint8) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, unsigned)
        return whole.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


def _bits(tree):
    """Return {leaf name: bit sum}. Names are keys because a pytree restored without its type has another order."""
    return {name: int(value) for name, value in pytree.names(jax.device_get(_bit_sums(tree)))}


class Checkpoints:
    """The checkpoints of one workdir; the newest `keep` are kept."""

    def __init__(self, workdir, keep=3):
        self.directory = epath.Path(workdir) / "checkpoints"
        self._loops, self._writes = contextlib.ExitStack(), False
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        with _disk(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory.resolve(),
                options=options,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )

    def save(self, step, state, position, config_json):
        """Start writing a checkpoint. The arrays are copied first, so the caller may donate the state at once."""
        record = {"position": int(position), "bits": _bits(state)}
        if not self._writes:  # from now until close(), orbax writes in threads of its own
            self._writes = True
            self._loops.enter_context(tidy_loops)
        runtime.trim_heap()
        with _disk(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(record),
                    config=ocp.args.JsonSave(json.loads(config_json)),
                ),
            )

    def steps(self):
        """Return the steps of all checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def config(self):
        """Return the config of the newest checkpoint whose config is readable, as a dict; None if there is none."""
        for step in reversed(self.steps()):
            try:
                return self._restore(step, config=ocp.args.JsonRestore())["config"]
            except Exception as error:
                log.warning("checkpoint %s: the config cannot be read (%s)", step, first_line(error))
        return None

    def restore(self, state):
        """Return (step, state, position) of the newest intact checkpoint, or None if there are no checkpoints.

        Damaged checkpoints are renamed to damaged_STEP with a warning.

        Args:
          state: pytree of arrays, or of shapes with shardings, like the state to restore.

        Raises:
          UserError: all checkpoints are damaged.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        steps = self.steps()
        for step in reversed(steps):
            try:
                restored, record = self._checked(step, shapes)
                return step, restored, record["position"]
            except Exception as error:
                self._set_aside(step, error)
        if steps:
            raise UserError(f"{self.directory}: none of the checkpoints {steps} can be read", exit_code=RUN_FAILED)
        return None

    def restore_variables(self, step=None):
        """Return (step, {"params", "batch_stats"}) of the newest intact checkpoint, on one device.

        The parameters are the moving average if the run keeps one. The mesh that wrote them does not matter. Nothing on
        disk changes: a damaged checkpoint is skipped with a warning.

        Args:
          step: read this checkpoint only; None for the newest.

        Raises:
          UserError: no checkpoint can be read.
        """
        here = SingleDeviceSharding(jax.local_devices()[0])
        for step in reversed(self.steps() if step is None else [step]):
            try:
                with tidy_loops:
                    written = self._manager.item_metadata(step)["state"].tree
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), written)
                state, _ = self._checked(step, shapes)
                return step, {"params": state["ema"] or state["params"], "batch_stats": state["batch_stats"]}
            except Exception as error:
                log.warning("checkpoint %s is damaged (%s): skipping it", step, first_line(error))
        raise UserError(f"{self.directory}: no checkpoint {'' if step is None else f'{step} '}can be read")

    def _checked(self, step, shapes):
        """Return (state, data record) of one checkpoint, typed and sharded as `shapes`.

        Raises:
          ValueError: the bits differ from the recorded sums, or the config is missing.
        """
        json_restore = ocp.args.JsonRestore()
        items = self._restore(step, state=ocp.args.StandardRestore(shapes), data=json_restore, config=json_restore)
        if not items["config"]:
            raise ValueError("the config is missing")
        if _bits(items["state"]) != items["data"]["bits"]:
            raise ValueError("the bit sums differ from those recorded")
        return items["state"], items["data"]

    def wait(self):
        """Wait until saved checkpoints are on disk, and raise any error of the writing threads."""
        with _disk(self.directory):
            self._manager.wait_until_finished()

    def close(self):
        """Wait for running writes and close the manager."""
        with self._loops, _disk(self.directory):
            self._manager.close()

    def _restore(self, step, **items):
        with tidy_loops:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, step, error):
        log.warning("checkpoint %s is damaged (%s): falling back to the previous one", step, first_line(error))
        if jax.process_index() == 0:
            target = self.directory / f"damaged_{step}"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        distributed.barrier("set aside")
        self._manager.reload()


class _disk:
    """Convert file system errors (full, read-only, no permission) to a UserError with exit code 1."""

    WORDS = (
        "no space left",
        "file too large",
        "disk quota",
        "read-only file system",
        "permission denied",
        "resource_exhausted",
    )

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and (isinstance(error, OSError) or any(w in str(error).lower() for w in self.WORDS)):
            raise UserError(f"{self.directory} cannot be written: {first_line(error)}", exit_code=RUN_FAILED) from error
