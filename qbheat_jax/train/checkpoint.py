"""Checkpoints: state, data position and config together, written in the background; the only room that knows orbax.

WORKDIR/checkpoints/STEP/ holds all that is needed to go on. Each carries a sum over the bits of every array, so that
a file damaged on disk is found out when it is read, and the checkpoint before it is taken instead.
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
    """uint32 sum of the bits of each leaf, in the tree's shape; exact, so the same however the leaf is sharded."""

    def bits(leaf):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[leaf.dtype.itemsize]
        whole = leaf.astype(jnp.uint8) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, unsigned)
        return whole.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


def _bits(tree):
    """{name of a leaf: the sum of its bits}. By name, since a tree restored without its type has another order."""
    return {name: int(value) for name, value in pytree.names(jax.device_get(_bit_sums(tree)))}


class Checkpoints:
    """The checkpoints of one workdir. `keep`: how many are kept, the newest ones."""

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
        """Starts writing; the arrays are copied first, so the state may be donated at once."""
        record = {"position": int(position), "bits": _bits(state)}
        if not self._writes:  # from now on in threads of orbax, until this is closed
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
        return sorted(self._manager.all_steps())

    def config(self):
        """The config of the newest checkpoint whose config can be read, as a dict; None without one."""
        for step in reversed(self.steps()):
            try:
                return self._restore(step, config=ocp.args.JsonRestore())["config"]
            except Exception as error:
                log.warning("checkpoint %s: its config cannot be read (%s)", step, first_line(error))
        return None

    def restore(self, state):
        """(step, state, position) of the newest checkpoint that is whole, or None where there is none at all.

        `state`: arrays, or shapes with shardings, as the restored state is to be. A torn or damaged checkpoint is moved
        aside with a warning and the one before it taken; if all are damaged, UserError.
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
        """(step, {"params", "batch_stats"} as arrays) of the newest whole checkpoint, or of that one; the average where kept.

        On one device, whatever mesh wrote it. Reading changes nothing: a damaged checkpoint is passed over with a warning,
        and stays where it is.
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
                log.warning("checkpoint %s is damaged (%s): it is passed over", step, first_line(error))
        raise UserError(f"{self.directory}: there is no checkpoint that can be read")

    def _checked(self, step, shapes):
        """(state, data record) of one checkpoint, typed and sharded as `shapes`.

        ValueError where bits have changed, or where it does not say what config its state is of.
        """
        json_restore = ocp.args.JsonRestore()
        items = self._restore(step, state=ocp.args.StandardRestore(shapes), data=json_restore, config=json_restore)
        if not items["config"]:
            raise ValueError("its config is missing")
        if _bits(items["state"]) != items["data"]["bits"]:
            raise ValueError("what was read is not what was written")
        return items["state"], items["data"]

    def wait(self):
        """Until what was saved is on disk; errors of the writing come out here."""
        with _disk(self.directory):
            self._manager.wait_until_finished()

    def close(self):
        with self._loops, _disk(self.directory):
            self._manager.close()

    def _restore(self, step, **items):
        with tidy_loops:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, step, error):
        log.warning("checkpoint %s is damaged (%s): taking the one before it", step, first_line(error))
        if jax.process_index() == 0:
            target = self.directory / f"damaged_{step}"
            if target.exists():
                target.rmtree()
            (self.directory / str(step)).rename(target)
        distributed.barrier("set aside")
        self._manager.reload()


class _disk:
    """Turns what a file system refuses (full, read-only, no permission) into one line and exit code 1."""

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
