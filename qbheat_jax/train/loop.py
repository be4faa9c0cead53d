"""The one training loop: mesh, data, model, shard, restore, step, log, evaluate, save."""

import collections
import contextlib
import logging
import math
import sys
import time

import jax
import numpy as np
from etils import epath

from qbheat_jax import atomic, device_mesh, pytree, rng
from qbheat_jax import config as config_lib
from qbheat_jax import data as data_lib
from qbheat_jax.data import device_cache
from qbheat_jax.errors import PREEMPTED, RUN_FAILED, UserError, writing
from qbheat_jax.train import config_tables, distributed, flops, loggers, metrics, optim, profile, sharding
from qbheat_jax.train import state as state_lib
from qbheat_jax.train.checkpoint import Checkpoints

log = logging.getLogger("qbheat")


def train(config, workdir, method, source, evaluators=(), start=None, lr_multipliers=None, pictures=None, traced=None):
    """Train a method on a source, or resume the run in the workdir.

    Args:
      config: Checked config of a training task.
      workdir: Directory of the run.
      method: See `methods.base.Method`.
      source: Data source, see `data.open_source`.
      evaluators: Functions of the variables that return {name: number}, run every `eval_every` steps and at the end.
      start: Variables {"params": {part: tree}, "batch_stats": ...} that a new run's parts start from; None: random.
      lr_multipliers: As of `optim.optimizer`.
      pictures: Function of the variables that returns {name: uint8 [H, W, 3]} for TensorBoard, run every `images_every` steps
        and at the end.
      traced: (first, last) step of a `profile.Trace`; None: no trace.

    Returns:
      {"step", "steps_run", "skipped_files", "seconds", "images_per_second"}, "gflops_per_image" (recomputation included)
      where steps were run, and the last evaluation's figures.

    Raises UserError for invalid combinations before anything is compiled; for a loss that is not finite (exit code 1); for
    SIGTERM, after the step has finished and been saved (exit code 143).
    """
    workdir, started = epath.Path(workdir), time.perf_counter()
    loggers.check(config.loggers)

    # Mesh
    mesh = device_mesh.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, method, mesh, config.accumulate)
    sharding.check_heads(method, mesh)

    # Data
    spec, examples = method.batch_spec(config), source.splits[config.data.split]
    spec.check(source, config.data.split)
    steps = optim.total_steps(config, examples)
    bad = data_lib.BadFiles(config.data.max_bad_fraction, examples)

    # Model and shard: parameters are born sharded
    key = rng.root(config.seed)
    schedule = optim.schedule(config, steps, examples)
    optimizer = optim.optimizer(config, schedule, lr_multipliers, steps)
    saved = Checkpoints(workdir, config.keep)
    prepare_workdir(workdir, config, saved.config())
    shapes = spec.shapes(config.batch_size)
    state, shardings = state_lib.create(method, optimizer, shapes, key, mesh, config.ema)
    sharding.check_split(shardings, mesh)
    step_fn = state_lib.train_step(method, optimizer, key, shardings, mesh, config.ema, config.accumulate)

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
    # Before the writer, since it may bring tensorflow, which TensorBoard needs.
    batches = _device_batches(config, spec, source, mesh, position, bad)
    writer = metrics.Writer(workdir, step, config.loggers, config)
    progress, forecast = metrics.Progress(step, steps, config.batch_size), metrics.Forecast(step, steps, config)
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
        progress.note(figures)
        return figures

    try:
        if begin and evaluators and due("eval_every", begin):  # an earlier process may have ended within it
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
                # Before the first step there is nothing to save, and SIGTERM ends the process.
                guard = guard or distributed.PreemptionGuard()
                progress.advance(step)
                forecast.after(step, step_metrics["loss"])
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
        writer.close(failed=sys.exc_info()[0] is not None)
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
    if step > begin:  # jit has kept the trace
        run["gflops_per_image"] = flops.count(step_fn.trace(state, batch).jaxpr) / config.batch_size / 1e9
    return {**run, **evaluated}


def prepare_workdir(workdir, config, saved=None):
    """Make the workdir and write its config.json.

    saved: config of the newest checkpoint as a dict, or None. Without a checkpoint there is nothing to lose, and an earlier
    config.json is replaced. Raises UserError where the checkpoint is of another config.
    """
    if saved is not None:
        differ = config_lib.differing(saved, config, config_tables.of)
        if differ:
            words = ", ".join(f"{key}={old!r} (now {new!r})" for key, old, new in differ[:5])
            raise UserError(
                f"--workdir {workdir} holds another run, with {words}: take another --workdir, or that config"
            )
    if jax.process_index() == 0:
        with writing(f"--workdir {workdir}"):
            workdir.mkdir(parents=True, exist_ok=True)
            atomic.write(workdir / "config.json", config_lib.to_json(config))


class _Due:
    """`due(name, step)`: whether the config's duration `name` falls on a step. All are due at the last step.

    Logging is due at the first step of a process too, so that a mistake shows at once.
    """

    def __init__(self, config, steps, examples, begin):
        names = [name for name, field in config_tables.of(config).items() if field.duration and name != "warmup"]
        self._every = {name: optim.duration(config, name, steps, examples) for name in names}
        self._steps, self._begin = steps, begin

    def __call__(self, name, step):
        every = self._every[name]
        return step == self._steps or (every and step % every == 0) or (name == "log_every" and step == self._begin + 1)


class _History:
    """Metrics since the last report, kept on the device, since reading every step would stall it.

    Every loss is read before a checkpoint is written, so no checkpoint holds a state that is not finite.
    """

    def __init__(self, workdir, saved):
        self.workdir, self.saved = workdir, saved
        self._pending, self._looked = collections.deque(), []

    def add(self, step, values):
        self._pending.append((step, values))

    def unseen(self):
        """Return whether there were steps since the last call of `means`."""
        return bool(self._pending or self._looked)

    def busy(self):
        """Return whether the device still works on the last step."""
        return bool(self._pending) and not self._pending[-1][1]["loss"].is_ready()

    def check(self):
        """Raise UserError (exit code 1) naming the first step whose loss is not finite."""
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
        """Return the mean of each metric over the steps since the last call."""
        self.check()
        means = {name: float(np.mean([v[name] for v in self._looked])) for name in self._looked[0]}
        self._looked.clear()
        return means


def _device_batches(config, spec, source, mesh, position, bad):
    """Return an iterator over batches on the mesh. `data.prefetch` of them are on their way while a step runs."""
    cache = device_cache.of(config.data, config.image_size, source, config.data.split, mesh) if spec.cacheable else None
    local = data_lib.train_batches(
        source,
        spec,
        split=config.data.split,
        batch_size=config.batch_size,
        position=position,
        rows=device_mesh.rows(mesh, config.batch_size),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        bad=bad,
        cache=cache,
    )
    names = spec.shapes(config.batch_size)

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
