"""Loggers beside metrics.jsonl: TensorBoard, CSV, Weights & Biases, MLflow. They never stop a run, and never hold it up.

`Loggers` is the one door to them. A logger that raises at any call is named in one line of the log and dropped. Those that
use a network work in threads of their own. Their libraries are imported only where a config names them.
"""

import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import queue
import secrets
import sys
import threading
import time

from etils import epath

from qbheat_jax import atomic, paths
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError, first_line

log = logging.getLogger("qbheat")

# Seconds that the end of a run waits for a logger to send what it still holds.
PATIENCE = 30.0
# Name of a run's project or experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME gives another.
PROJECT = "qbheat_jax"


def names(text):
    """Return the loggers that a config names.

    >>> names("tensorboard, csv")
    ['tensorboard', 'csv']
    >>> names("")
    []
    """
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def known(text):
    """Return whether all loggers that a config names exist."""
    return all(name in LOGGERS for name in names(text))


def check(text):
    """Raise UserError where the library of a logger that a config names is not installed."""
    for name in names(text):
        module = LOGGERS[name].library
        if module and importlib.util.find_spec(module) is None:
            raise UserError(
                f"config field loggers={text!r} needs {module}, which is not installed: pip install 'qbheat_jax[{name}]'"
            )


class Loggers:
    """The loggers of a run, in process 0 alone.

    Args:
      text: the config's `loggers`.
      workdir: directory of the run.
      config: the run's config; None where there is none.
      lines: of metrics.jsonl, as an interrupted run has left them.
      first_step: step that the run resumes from; 0 of a new run.
    """

    def __init__(self, text, workdir, config=None, lines=(), first_step=0):
        self._live = {}
        # An interrupted run wrote these after its last checkpoint. A remote logger that had them cannot take them back, so
        # they are not sent again.
        self._sent = {(line["step"], name) for line in lines if line["step"] >= first_step for name in line}
        kept = [line for line in lines if line["step"] <= first_step]
        run = Run(epath.Path(workdir), config_lib.flatten(config) if config else {}, kept, bool(first_step))
        self._resumed = {name for name in names(text) if LOGGERS[name].remote and run.id(name)}
        for name in names(text):
            kind = LOGGERS[name]
            with self._dropping(name):
                self._live[name] = _Threaded(name, lambda kind=kind: kind(run)) if kind.remote else kind(run)

    def write(self, step, values):
        """Write {name: float} of a step."""
        new = {name: value for name, value in values.items() if (step, name) not in self._sent}
        for name, logger in list(self._live.items()):
            shown = new if name in self._resumed else values
            with self._dropping(name):
                if shown:
                    logger.write(step, shown)

    def show(self, step, pictures):
        """Write images {name: uint8 [H, W, 3]} of a step."""
        for name, logger in list(self._live.items()):
            with self._dropping(name):
                logger.show(step, pictures)

    def close(self, failed=False):
        """Close all loggers. failed: whether the run ended by an error."""
        for name, logger in list(self._live.items()):
            with self._dropping(name):
                logger.close(failed)

    @contextlib.contextmanager
    def _dropping(self, name):
        try:
            yield
        except Exception as error:
            self._live.pop(name, None)
            _tell(name, error)


def _tell(name, error):
    reason = f"{type(error).__name__}: {first_line(error)}"
    log.warning(
        "logger %s failed (%s) and is dropped; the run goes on, and metrics.jsonl has its figures", name, reason
    )


class Run:
    """What a logger knows of its run: workdir, config {dotted key: value}, lines so far, and the id of its earlier part."""

    _lock = threading.Lock()  # loggers.json is written by several threads

    def __init__(self, workdir, config, lines, resumed):
        self.workdir, self.config, self.lines, self.resumed = workdir, config, lines, resumed
        self.name = str(workdir).rstrip("/").rpartition("/")[2]
        self._file = workdir / "loggers.json"

    def id(self, name):
        """Return the id that a logger gave this run before it was interrupted, or None."""
        return self._ids().get(name) if self.resumed else None

    def keep(self, name, value):
        """Record the id that a logger gives this run."""
        with self._lock:
            atomic.write(self._file, json.dumps({**self._ids(), name: value}) + "\n")

    def _ids(self):
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Logger:
    """Base class. A subclass is constructed with a `Run`, and writes what it can show."""

    # The module that it imports, and whether it sends what it gets to a server, for which it may have to wait.
    library, remote = "", False

    def write(self, step, values):
        """Write {name: float} of a step."""

    def show(self, step, pictures):
        """Write images {name: uint8 [H, W, 3]} of a step."""

    def close(self, failed):
        """Finish. failed: whether the run ended by an error."""


class TensorBoard(Logger):
    """Event files in the workdir, through clu. It needs tensorflow, and is used only where the data have imported it."""

    def __init__(self, run):
        self._board = None
        if "tensorflow" not in sys.modules:
            log.info(
                "tensorflow is not loaded: metrics go to %s only, not to TensorBoard", run.workdir / "metrics.jsonl"
            )
            return
        from clu import metric_writers

        self._board = metric_writers.SummaryWriter(str(run.workdir))

    def write(self, step, values):
        if self._board:
            self._board.write_scalars(step, values)

    def show(self, step, pictures):
        if self._board:
            self._board.write_images(step, {name: picture[None] for name, picture in pictures.items()})

    def close(self, failed):
        if self._board:
            self._board.close()


class Csv(Logger):
    """WORKDIR/metrics.csv: a row a line of metrics.jsonl, a column a metric. A new metric rewrites the file."""

    def __init__(self, run):
        self._path, self._rows, self._columns = run.workdir / "metrics.csv", [], ["step"]
        self._add(run.lines)
        self._rewrite()

    def write(self, step, values):
        row = {"step": step, **values}
        if self._add([row]) or paths.remote(self._path):
            self._rewrite()
        else:
            with self._path.open("a") as file:
                file.write(self._text([row]))

    def _add(self, rows):
        """Add rows. Return whether they brought new columns."""
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self._columns]
        self._columns += new
        self._rows += rows
        return bool(new)

    def _rewrite(self):
        atomic.write(self._path, self._text([dict(zip(self._columns, self._columns)), *self._rows]))

    def _text(self, rows):
        buffer = io.StringIO()
        csv.DictWriter(buffer, self._columns, lineterminator="\n").writerows(rows)
        return buffer.getvalue()


class Wandb(Logger):
    """A run of Weights & Biases. Its variables apply: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, ..."""

    library, remote = "wandb", True

    def __init__(self, run):
        import wandb

        self._image = wandb.Image
        here = {} if paths.remote(run.workdir) else {"dir": str(run.workdir)}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id("wandb") or secrets.token_hex(4),
            name=run.name,
            config=run.config,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
            **here,
        )
        run.keep("wandb", self._run.id)
        # W&B ignores a step below its last. A resumed run comes to such steps, so the step is a metric like any other.
        self._run.define_metric("*", step_metric="step")
        log.info("Weights & Biases: run %s, %s", self._run.id, self._run.dir if self._run.offline else self._run.url)

    def write(self, step, values):
        self._run.log({"step": step, **values})

    def show(self, step, pictures):
        self._run.log({"step": step, **{name: self._image(picture) for name, picture in pictures.items()}})

    def close(self, failed):
        self._run.finish(exit_code=int(failed))


class Mlflow(Logger):
    """A run of MLflow. Its variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    library, remote = "mlflow", True
    _PARAMS = 100  # that one request takes

    def __init__(self, run):
        from mlflow import entities, tracking

        self._metric, self._client = entities.Metric, tracking.MlflowClient()
        self._id = run.id("mlflow")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [entities.Param(key, str(value)) for key, value in run.config.items()]
            for n in range(0, len(params), self._PARAMS):
                self._client.log_batch(self._id, params=params[n : n + self._PARAMS])
        run.keep("mlflow", self._id)
        log.info("MLflow: run %s", self._id)

    def write(self, step, values):
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step, pictures):
        for name, picture in pictures.items():
            self._client.log_image(self._id, picture, key=name, step=step)

    def close(self, failed):
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


LOGGERS = {"tensorboard": TensorBoard, "csv": Csv, "wandb": Wandb, "mlflow": Mlflow}


class _Threaded:
    """A logger in a thread of its own, from its construction on: calls return at once, and never raise."""

    def __init__(self, name, make):
        self._name, self._queue, self._dropped = name, queue.SimpleQueue(), False
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"qbheat-{name}", daemon=True)
        self._thread.start()

    def write(self, *arguments):
        self._put("write", arguments)

    def show(self, *arguments):
        self._put("show", arguments)

    def close(self, failed):
        """Close the logger, and wait up to PATIENCE seconds for what it still sends."""
        self._put("close", (failed,))
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._dropped = True
            raise TimeoutError(f"it is not done after {PATIENCE:g} s")

    def _put(self, *call):
        if not self._dropped:  # else a queue that nobody reads would grow
            self._queue.put(call)

    def _work(self, make):
        logger, method = None, ""
        try:
            logger = make()
            while method != "close":
                method, arguments = self._queue.get()
                getattr(logger, method)(*arguments)
        except BaseException as error:  # SystemExit too: some libraries exit where a login is missing
            if not self._dropped:
                self._dropped = True
                _tell(self._name, error)
            if logger is not None and method != "close":
                with contextlib.suppress(BaseException):
                    logger.close(True)
