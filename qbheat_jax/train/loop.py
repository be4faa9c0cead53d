"""The one training loop: mesh, data, model, shard, restore, step, log, evaluate, save."""

import collections
import contextlib
import logging
import math
import time

import jax
import numpy as np
from etils import epath

from qbheat_jax import atomic, device_mesh, methods, pytree, rng
from qbheat_jax import config as config_lib
from qbheat_jax import data as data_lib
from qbheat_jax.data import device_cache
from qbheat_jax.errors import PREEMPTED, RUN_FAILED, UserError
from qbheat_jax.ops import quarters
from qbheat_jax.train import distributed, flops, metrics, optim, profile, sharding
from qbheat_jax.train import state as state_lib
from qbheat_jax.train.checkpoint import Checkpoints

log = logging.getLogger("qbheat")


def train(
    config, workdir, objective, source, evaluators=(), start=None, lr_multipliers=None, pictures=None, traced=None
):
    """Trains `objective` on `source` as the config says; goes on where an earlier run in the workdir stopped.

    start: variables {"params": {part: ...}, "batch_stats": ...} that a new run's parts begin with instead of random ones.
    lr_multipliers: as of `optim.adamw`.
    evaluators: functions(variables) -> {name: number}, run every `eval_every` steps and at the end.
    pictures: function(variables) -> {name: uint8 [H, W, 3]}, for TensorBoard every `images_every` steps and at the end.
    traced: (first, last), the steps between which `profile.Trace` traces; None: none.
    Returns {"step", "steps_run", "skipped_files", "seconds", "images_per_second"}, of steps that were run
    "gflops_per_image" (what remat computes again included), and the last evaluation's figures.
    Raises UserError: impossible combinations before anything is compiled; a loss that is not finite (exit code 1); SIGTERM,
    after the step was finished and saved (exit code 143).
    """
    workdir, started = epath.Path(workdir), time.perf_counter()

    # Mesh
    mesh = device_mesh.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, objective, mesh, config.accumulate)
    sharding.check_heads(objective, mesh)

    # Data
    examples = source.splits[config.data.split]
    steps = optim.total_steps(config, examples)
    bad = data_lib.BadFiles(config.data.max_bad_fraction, examples)

    # Model, sharded as it is made
    key = rng.root(config.seed)
    schedule = optim.schedule(config, steps, examples)
    optimizer = optim.adamw(config, schedule, lr_multipliers)
    saved = Checkpoints(workdir, config.keep)
    prepare_workdir(workdir, config, saved.config())
    shapes = batch_shapes(config, methods.views(objective))
    state, shardings = state_lib.create(objective, optimizer, shapes, key, mesh, config.ema)
    sharding.check_split(shardings, mesh)
    step_fn = state_lib.train_step(objective, optimizer, key, shardings, mesh, config.ema, config.accumulate)

    # Restore
    step, position = 0, 0
    restored = saved.restore(state)
    if restored:
        step, state, position = restored
        word = "resuming" if step < steps else "finished already:"
        log.info("%s %s at step %d of %d", word, workdir, step, steps)
    else:
        if start is not None:
            state = state_lib.load_params(state, start)
        log.info("%d parameters, %d steps, seed %d", pytree.count(state.params), steps, config.seed)
    begin, evaluated = step, {}
    due = _Due(config, steps, examples, begin)
    batches = _device_batches(
        config, source, mesh, position, bad, methods.views(objective)
    )  # first, since it may bring tensorflow for TensorBoard
    writer, progress = metrics.Writer(workdir, step), metrics.Progress(step, steps, config.batch_size)
    history, guard, stop = _History(workdir, begin), None, False
    trace = profile.Trace(workdir, traced, begin, steps)

    def report():
        means = history.means()
        rates = progress.report(step, means["loss"])
        line = {**means, **rates, "learning_rate": float(schedule(step - 1))}
        writer.write(step, {f"train/{name}": value for name, value in line.items()})
        bad.check()

    def save():
        history.check()
        saved.save(step, state, position, config_lib.to_json(config))
        history.saved = step

    def evaluate():
        figures = {name: value for e in evaluators for name, value in e(state.variables()).items()}
        log.info("step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        writer.write(step, figures)
        return figures

    try:
        if begin and evaluators and due("eval_every", begin):  # an earlier process may have been ended within it
            evaluated = metrics.figures(workdir, begin)
            if distributed.agreed(not evaluated):
                evaluated = evaluate()
        try:
            while step < steps and not stop:
                # Step
                trace.begin(step, state)
                with progress.waiting(history.busy), guard.idle() if guard else contextlib.nullcontext():
                    batch = next(batches)
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, step_metrics = step_fn(state, batch)
                step, position = step + 1, position + config.batch_size
                history.add(step, step_metrics)
                # Before the first step is done there is nothing to save, and SIGTERM simply ends the process.
                guard = guard or distributed.PreemptionGuard()
                progress.advance(step)
                trace.end(step, state)
                stop = guard.should_stop() and step < steps

                # Log
                if due("log_every", step) and not stop:
                    report()

                # Evaluate
                with guard.idle():
                    if due("eval_every", step) and evaluators and not stop:
                        evaluated = evaluate()
                    if pictures and due("images_every", step) and not stop:
                        writer.show(step, pictures(state.variables()))

                # Save
                if due("checkpoint_every", step) and not stop:
                    save()
        except distributed.Stopped:
            stop = True
        if stop:
            if history.unseen():
                report()
            if history.saved < step:
                save()
        saved.wait()
    finally:
        batches.close()
        trace.close()
        writer.close()
        progress.close()
        saved.close()
        if guard:
            guard.close()
    if stop:
        raise UserError(
            f"stopped by SIGTERM at step {step} of {steps}, which is saved: the same command goes on from there",
            exit_code=PREEMPTED,
        )
    bad.check()
    seconds = time.perf_counter() - started
    run = {"step": step, "steps_run": step - begin, "skipped_files": bad.count, "seconds": seconds}
    run["images_per_second"] = (step - begin) * config.batch_size / seconds
    if step > begin:  # the steps' own trace, which jit has kept
        run["gflops_per_image"] = flops.count(step_fn.trace(state, batch).jaxpr) / config.batch_size / 1e9
    return {**run, **evaluated}


def batch_shapes(config, views=1):
    """Shapes and dtypes of a global batch of one or two crops an image, as the batch contract has them; a detector's has
    boxes beside them."""
    n, size, most = config.batch_size, config.image_size, config.data.get("max_boxes", 0)
    boxes = {
        "boxes": jax.ShapeDtypeStruct((n, most, 4), np.float32),
        "classes": jax.ShapeDtypeStruct((n, most), np.int32),
    }
    return {
        **{name: jax.ShapeDtypeStruct((n, size, size, 3), np.uint8) for name in ("image", "image2")[:views]},
        "quarter": jax.ShapeDtypeStruct((n,), np.int32),
        "label": jax.ShapeDtypeStruct((n,), np.int32),
        "mask": jax.ShapeDtypeStruct((n,), bool),
        **(boxes if most else {}),
    }


def prepare_workdir(workdir, config, saved=None):
    """Makes the workdir and writes its config.json; UserError where it holds a run of another config.

    `saved`: the config of the newest checkpoint, as a dict, or None. A run without a checkpoint has nothing to lose, and
    its config is simply replaced.
    """
    if saved is not None:
        differ = config_lib.differing(saved, config)
        if differ:
            words = ", ".join(f"{key}={old!r} (now {new!r})" for key, old, new in differ[:5])
            raise UserError(
                f"--workdir {workdir} holds another run, with {words}: take another --workdir, or that config"
            )
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            atomic.write(workdir / "config.json", config_lib.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be written: {error.strerror}") from error


class _Due:
    """due(name, step): whether the config's duration `name` falls on this step; all are due at the last step.

    Logging is due at the first step of a process too, so that a mistake shows at once.
    """

    def __init__(self, config, steps, examples, begin):
        names = [name for name, field in config_lib.table(config).items() if field.duration and name != "warmup"]
        self._every = {name: optim.duration(config, name, steps, examples) for name in names}
        self._steps, self._begin = steps, begin

    def __call__(self, name, step):
        every = self._every[name]
        return step == self._steps or (every and step % every == 0) or (name == "log_every" and step == self._begin + 1)


class _History:
    """Metrics of the steps since the last look, left on the device: looking at each step would stall the device.

    Every loss is looked at before a checkpoint is written, so none can hold a state that is no longer finite.
    """

    def __init__(self, workdir, saved):
        self.workdir, self.saved = workdir, saved
        self._pending, self._looked = collections.deque(), []

    def add(self, step, values):
        self._pending.append((step, values))

    def unseen(self):
        """Whether there were steps since the last call of `means`."""
        return bool(self._pending or self._looked)

    def busy(self):
        """Whether the device is not yet done with the last step."""
        return bool(self._pending) and not self._pending[-1][1]["loss"].is_ready()

    def check(self):
        """Raises UserError (exit code 1) that names the first step whose loss is not finite."""
        while self._pending:
            step, values = self._pending.popleft()
            values = jax.device_get(values)
            if not math.isfinite(values["loss"]):
                last = (
                    f"the last good checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
                )
                raise UserError(
                    f"the loss is {values['loss']} at step {step}; {last} ({self.workdir}). Try a lower learning_rate, a "
                    "longer warmup, clip_norm=1.0, or dtype=float32; the same --workdir goes on from its checkpoint only "
                    "with the same config",
                    exit_code=RUN_FAILED,
                )
            self._looked.append(values)

    def means(self):
        """Mean of each metric over the steps since the last call."""
        self.check()
        means = {name: float(np.mean([v[name] for v in self._looked])) for name in self._looked[0]}
        self._looked.clear()
        return means


def _device_batches(config, source, mesh, position, bad, views):
    """Batches on the mesh, `data.prefetch` of them on their way while a step runs."""
    if "max_boxes" in config.data:
        cache, shown = None, {"boxes": config.data.max_boxes, "jitter": config.data.jitter}
    else:
        cache = device_cache.of(config.data, config.image_size, source, config.data.split, mesh)
        shown = {"crop_scale": config.data.crop_scale, "crop_ratio": config.data.crop_ratio, "views": views}
    local = data_lib.train_batches(
        source,
        split=config.data.split,
        batch_size=config.batch_size,
        image_size=config.image_size,
        seed=config.seed,
        position=position,
        placements=quarters.PLACEMENT_SETS[config.quarter.placements] if "quarter" in config else (0,),
        flip=config.data.flip,
        rows=device_mesh.rows(mesh, config.batch_size),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        bad=bad,
        cache=cache,
        **shown,
    )
    names = batch_shapes(config, views)

    def batches():
        ready = collections.deque()
        try:
            for batch in local:
                batch = {name: batch[name] for name in names}
                ready.append(device_mesh.put_batch(batch, mesh, config.batch_size) if cache is None else batch)
                if len(ready) > config.data.prefetch:
                    yield ready.popleft()
        finally:
            local.close()

    return batches()
