"""Trace a few steps of a run with the profiler, and tabulate the longest kernels."""

import collections
import contextlib
import json
import logging
import pathlib
import re
import shutil
import tempfile
import time

import jax
from etils import epath

from qbheat_jax import paths
from qbheat_jax.errors import UserError

log = logging.getLogger("qbheat")

FOLDER = "profile"
# Characters of a kernel's name in the log; kernels.json has the full name.
_SHOWN = 90
# XLA ops on CPUs that only contain other ops, which are counted themselves.
_CONTAINERS = re.compile(r"(while|call|conditional)(\.|$)")


def parse(text):
    """Return (first, last) of a "FIRST,LAST" from the command line.

    Raises:
      UserError: unless 1 <= first < last.

    >>> parse("10,13")
    (10, 13)
    """
    match = re.fullmatch(r"(\d+),(\d+)", text.replace(" ", ""))
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < last:
        raise UserError(
            f"--profile_steps {text}: it takes two whole numbers FIRST,LAST with 1 <= FIRST < LAST, such as 10,13"
        )
    return first, last


class Trace:
    """Trace a run from the end of step `first` to the end of step `last`.

    Steps are numbered as in `metrics.jsonl`, so (10, 13) traces steps 11, 12 and 13. Call `begin` before each step and
    `end` after it. The trace is written to WORKDIR/profile, the table to the log and WORKDIR/profile/kernels.json. Only
    process 0 traces.

    Args:
      workdir: the run's directory; may be a bucket.
      between: (first, last), or None to trace nothing.
      begin: the step at which this process starts. Its first step compiles, so a trace can start only after that step.
      steps: the run's length.
    """

    def __init__(self, workdir, between, begin, steps):
        self._folder, self._between = epath.Path(workdir) / FOLDER, None
        self._local = self._started = None
        if between is None or jax.process_index():
            return
        first, last = between
        if max(first, begin) >= steps:
            log.warning("--profile_steps %d,%d traces nothing: the run ends at step %d", first, last, steps)
        elif first <= begin:
            log.warning(
                "--profile_steps %d,%d traces nothing: this process starts at step %d and compiles first, so FIRST must be at "
                "least %d", first, last, begin, begin + 1,
            )  # fmt: skip
        else:
            if last > steps:
                log.warning("--profile_steps %d,%d: the run and the trace end at step %d", first, last, steps)
            self._between = first, min(last, steps)

    def begin(self, step, state):
        """Wait for `state` and start the trace, if it begins after `step` steps."""
        if self._between and step == self._between[0]:
            jax.block_until_ready(state)
            # The profiler writes to disks only.
            self._local = tempfile.mkdtemp() if paths.remote(self._folder) else str(self._folder)
            start(self._local)
            self._started = time.perf_counter()

    def end(self, step, state):
        """Stop the trace if it ends after `step` steps, and log its table."""
        if self._started is None or step != self._between[1]:
            return
        jax.block_until_ready(state)
        seconds, self._started = time.perf_counter() - self._started, None
        jax.profiler.stop_trace()
        first, last = self._between
        table = {"first": first, "last": last, "step_ms": 1000 * seconds / (last - first)}
        table |= longest(self._local, last - first)
        (pathlib.Path(self._local) / "kernels.json").write_text(json.dumps(table, indent=2) + "\n")
        self._to_bucket()
        log.info("profile of steps %d to %d, in %s\n%s", first + 1, last, self._folder, text(table))

    def close(self):
        """Stop a trace that the end of the run cut short; it is written without a table."""
        if self._started is not None:
            self._started = None
            jax.profiler.stop_trace()
            self._to_bucket()
            log.warning("the trace in %s is cut short, so its kernels are not counted", self._folder)

    def _to_bucket(self):
        if self._local == str(self._folder):
            return
        for file in (p for p in pathlib.Path(self._local).rglob("*") if p.is_file()):
            target = self._folder / file.relative_to(self._local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        shutil.rmtree(self._local)


def start(folder):
    """Start a trace into FOLDER/plugins/profile, where TensorBoard looks; `jax.profiler.stop_trace` stops it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python calls would outnumber the kernels
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)


@contextlib.contextmanager
def trace(folder):
    """Trace the code inside, which must wait for the device itself."""
    start(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def longest(folder, steps=1, count=None):
    """Sum the device's kernels in the newest trace below a folder.

    Args:
      folder: the folder given to `start`.
      steps: number of traced steps; figures are per step.
      count: number of rows returned; None for all.

    Returns:
      {"devices", "kernel_ms", "launches", "kernels": [{"ms", "times", "name"}, ...]}: milliseconds and launches per step
      and device, the longest kernel first. Copies and memsets count as launches. Kernels on several streams overlap, so
      `kernel_ms` may exceed the step's time. Without device planes, "devices" is 0 and the kernels are XLA's CPU
      operations, summed over threads.
    """
    planes = [p for file in _newest(folder) for p in jax.profiler.ProfileData.from_file(str(file)).planes]
    devices = [p for p in planes if re.fullmatch(r"/device:\w+:\d+", p.name)]
    events = [e for plane in devices for e in _kernels(plane)] if devices else list(_host_operations(planes))
    times, nanoseconds = collections.Counter(), collections.Counter()
    for name, duration in events:
        times[name] += 1
        nanoseconds[name] += duration
    divisor = steps * max(1, len(devices))
    rows = [
        {"ms": ns / divisor / 1e6, "times": times[name] / divisor, "name": name}
        for name, ns in nanoseconds.most_common()
    ]
    return {
        "devices": len(devices),
        "kernel_ms": nanoseconds.total() / divisor / 1e6,
        "launches": len(events) / divisor,
        "kernels": rows[:count],
    }


def _newest(folder):
    """Return the .xplane.pb files of the newest trace below a folder."""
    traces = sorted((pathlib.Path(folder) / "plugins" / "profile").iterdir(), key=lambda path: path.stat().st_mtime)
    return sorted(traces[-1].glob("*.xplane.pb"))


def _kernels(plane):
    """Yield (name, nanoseconds) of each kernel that ran on a device.

    A GPU has one line per stream, a TPU one line of XLA ops. Other lines repeat the same time by module, step or scope.
    """
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    chosen = streams or [line for line in lines if line.name == "XLA Ops"] or lines
    return ((event.name, event.duration_ns) for line in chosen for event in line.events)


def _host_operations(planes):
    for plane in planes:
        for line in plane.lines if plane.name == "/host:CPU" else ():
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats) and not _CONTAINERS.match(event.name):
                    yield event.name, event.duration_ns


def text(table, count=20):
    """Return a table of `longest` as text for the log."""
    where = "kernels" if table["devices"] else "CPU operations (no device is in the trace)"
    step = f"{table['step_ms']:.2f} ms a step, traced; " if "step_ms" in table else ""
    lines = [f"{step}{table['kernel_ms']:.2f} ms of {where} in {table['launches']:,.0f} launches a step"]
    lines += [f"{'ms':>9} {'times':>7}  name"]
    for row in table["kernels"][:count]:
        lines.append(f"{row['ms']:9.3f} {row['times']:7.4g}  {row['name'][:_SHOWN]}")
    return "\n".join(lines)
