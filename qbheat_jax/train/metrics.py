"""Write metrics to metrics.jsonl and to the config's loggers; show progress on the terminal."""

import contextlib
import json
import logging
import sys
import time

import jax
from etils import epath
from tqdm import tqdm

from qbheat_jax import atomic, paths
from qbheat_jax.train import loggers as loggers_lib

log = logging.getLogger("qbheat")

# Figures of an evaluation that the progress line shows, and their names there.
NOTED = {"online/rankme": "RankMe", "online/lidar": "LiDAR", "online/knn": "k-NN", "online/lin": "linear"}


class Writer:
    """Append {"step": ..., "train/loss": ...} lines to WORKDIR/metrics.jsonl, and pass them to the config's loggers.

    Only process 0 writes. On resume, lines after `first_step` are dropped, so no step appears twice.

    Args:
      workdir: Directory of the run.
      first_step: Step that the run resumes from; 0 of a new run.
      loggers: Field `loggers` of the config, see `train.loggers`.
      config: The run's config, for the loggers.
    """

    def __init__(self, workdir, first_step=0, loggers="tensorboard", config=None):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if not self._active:
            return
        before = read(workdir) if first_step else []
        self._text = "".join(json.dumps(line) + "\n" for line in before if line["step"] <= first_step)
        atomic.write(self._path, self._text)
        # Bucket objects cannot be appended to, only rewritten.
        self._file = None if paths.remote(self._path) else self._path.open("a")
        self._loggers = loggers_lib.Loggers(loggers, workdir, config, before, first_step)

    def write(self, step, values):
        """Write {name: number} for a step and flush, so that a killed run loses nothing."""
        if not self._active:
            return
        step, values = int(step), {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._text += line
            self._path.write_text(self._text)
        self._loggers.write(step, values)

    def show(self, step, pictures):
        """Write images {name: uint8 [H, W, 3]} to the loggers that take them."""
        if self._active:
            self._loggers.show(int(step), pictures)

    def close(self, failed=False):
        """Close metrics.jsonl and the loggers. failed: whether the run ended by an error."""
        if self._active:
            if self._file:
                self._file.close()
            self._loggers.close(failed)


def figures(workdir, step):
    """Return the evaluation metrics of a step, {"val/loss": ...}; {} if there are none."""
    found = {}
    for line in read(workdir):
        if line["step"] == step:
            found |= {name: value for name, value in line.items() if name != "step" and not name.startswith("train/")}
    return found


def read(workdir):
    """Return the lines of WORKDIR/metrics.jsonl as dicts, without lines that a killed process left incomplete."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("step"), int):
            lines.append(said)
    return lines


class Progress:
    """Show step, loss, images/s, fraction of time waiting for data and time left: a bar on a terminal, else log lines."""

    def __init__(self, start, total, batch_size):
        self.batch_size, self.total = batch_size, total
        self._bar = None
        if jax.process_index() == 0 and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._waited, self._note = 0.0, ""
        self._start, self._step, self._time = start, start, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self, busy=lambda: False):
        """Count the time of the block as waiting for data, unless `busy()` is true afterwards: the device still computes."""
        start = time.perf_counter()
        yield
        if not busy():
            self._waited += time.perf_counter() - start

    def note(self, figures):
        """Show the monitors of the last evaluation, of {name: number}, in all reports to come."""
        shown = (f"{NOTED[name]} {value:.3g}" for name, value in figures.items() if name in NOTED)
        self._note = "".join(f", {text}" for text in shown)

    def advance(self, step):
        """Move the progress bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step, loss):
        """Show and return the figures since the last report, {"images_per_second", "data_wait"}.

        The first step of a process compiles, so its report has no figures.
        """
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        if step == self._start + 1:
            if self._bar is None:
                log.info("step %d of %d, loss %.4f, compiled in %.0f s", step, self.total, loss, seconds)
            self._step, self._time, self._waited = step, now, 0.0
            return {}
        rate = (step - self._step) / seconds
        figures = {"images_per_second": rate * self.batch_size, "data_wait": min(self._waited / seconds, 1.0)}
        text = (
            f"loss {loss:.4f}, {figures['images_per_second']:.0f} images/s, waiting for data {figures['data_wait']:.0%}"
            f"{self._note}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            left = (self.total - step) / rate if rate else float("inf")
            log.info("step %d of %d, %s, %s left", step, self.total, text, tqdm.format_interval(left))
        self._step, self._time, self._waited = step, now, 0.0
        return figures

    def close(self):
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


class Forecast:
    """Warn once, early, where a run on CPUs will take more than LONG seconds.

    It waits for the first three steps of the process, and takes the faster of the second and the third. Process 0 warns.
    Accelerators are left out: days are usual there.
    """

    LONG = 3600.0

    def __init__(self, start, total, config):
        self._start, self._total, self._config = start, total, config
        self._ends = []
        self._active = jax.process_index() == 0 and jax.default_backend() == "cpu"

    def after(self, step, loss):
        """Take note of a step that was started. loss: its loss, a jax.Array."""
        if not self._active:
            return
        loss.block_until_ready()
        self._ends.append(time.perf_counter())
        if len(self._ends) < 3:
            return
        self._active = False
        first, second, third = self._ends
        seconds = (self._total - step) * min(second - first, third - second)
        if seconds <= self.LONG:
            return
        length = "total_steps" if self._config.get("total_steps") else "total_epochs"
        log.warning(
            "this run will take about %.0f hours on the CPUs of this machine. For minutes, stop it and take "
            "configs/folder_small.py, or lower image_size=%d and %s=%g, or replace encoder.name=%s by a smaller one",
            seconds / 3600, self._config.image_size, length, self._config[length], self._config.encoder.name,
        )  # fmt: skip
