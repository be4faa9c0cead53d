"""Write metrics to metrics.jsonl and, if tensorflow is loaded, to TensorBoard; show progress on the terminal."""

import contextlib
import json
import logging
import sys
import time

import jax
from etils import epath
from tqdm import tqdm

from qbheat_jax import atomic, paths

log = logging.getLogger("qbheat")

# Figures of an evaluation that the progress line shows, and their names there.
NOTED = {"online/rankme": "RankMe", "online/lidar": "LiDAR", "online/knn": "k-NN", "online/lin": "linear"}


class Writer:
    """Append {"step": ..., "train/loss": ...} lines to WORKDIR/metrics.jsonl and to TensorBoard.

    Only process 0 writes. On resume, lines after `first_step` are dropped, so no step appears twice. TensorBoard
    (through clu) needs tensorflow. It is used only if the data pipeline has already imported tensorflow, so training also
    works without it.
    """

    def __init__(self, workdir, first_step=0):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._board = None
        if not self._active:
            return
        kept = [line for line in read(workdir) if line["step"] <= first_step] if first_step else []
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic.write(self._path, self._text)
        # Bucket objects cannot be appended to, only rewritten.
        self._file = None if paths.remote(self._path) else self._path.open("a")
        if "tensorflow" in sys.modules:
            from clu import metric_writers

            self._board = metric_writers.SummaryWriter(str(workdir))
        else:
            log.info("tensorflow is not loaded: metrics go to %s only, not to TensorBoard", self._path)

    def write(self, step, values):
        """Write {name: number} for a step and flush, so that a killed run loses nothing."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": int(step), **values}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._text += line
            self._path.write_text(self._text)
        if self._board:
            self._board.write_scalars(int(step), values)

    def show(self, step, pictures):
        """Write images {name: uint8 [H, W, 3]} to TensorBoard only."""
        if self._active and self._board:
            self._board.write_images(int(step), {name: picture[None] for name, picture in pictures.items()})

    def close(self):
        """Close metrics.jsonl and the TensorBoard writer."""
        if self._active:
            if self._file:
                self._file.close()
            if self._board:
                self._board.close()


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
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
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
