"""A small training run in child processes that can be started, killed and restarted, and its loss curve."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
# Time limit of a run in seconds.
LIMIT = 180
# Beginning of the message of `differs` about different steps.
OTHER_STEPS = "metrics.jsonl has steps"

CONFIG = {
    "seed": 3, "image_size": 64, "batch_size": 16, "total_steps": STEPS, "log_every": 1, "checkpoint_every": 3, "keep": 2,
    "eval_every": 12, "learning_rate": 1e-3, "warmup": 2, "data": {"source": "photos"},
    "encoder": {"name": "mobilenet_v2"}, "quarter": {"placements": "corners"}, "decoder": {"width": 32, "depth": 1, "heads": 2},
}  # fmt: skip


class Run:
    """A workdir and the processes that train in it.

    Args:
      place: Folder of the workdir.
      name: Name of the workdir.
      processes: Number of processes of the run.
      devices: Virtual CPU devices of each process.
      steps: Length of the run.
      log: `Path` of the log; by default next to the workdir.
    """

    def __init__(self, place, name, processes=1, devices=1, steps=STEPS, log=None):
        self.workdir, self.processes, self.devices = Path(place) / name, processes, devices
        self._log = log or Path(place) / f"{name}.log"
        self._config = self._log.with_name("config.py")
        self._config.write_text(f"def get_config():\n    return {CONFIG!r}\n")
        self._overrides = ["--config.total_steps", str(steps)]
        self.children = []

    def start(self):
        """Start all processes of the run."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "qbheat_jax", "pretrain", "--config", str(self._config), "--workdir", str(self.workdir),
            *self._overrides,
        ]  # fmt: skip
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}",
        }  # fmt: skip
        self.children = []
        for k in range(self.processes):
            joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(self.processes), "--process", str(k)]
            with self._log.open("ab") as log:
                self.children.append(
                    subprocess.Popen(
                        command + joined * (self.processes > 1), cwd=ROOT, env=environment, stdout=log, stderr=log,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def running(self):
        """Return whether all processes are running."""
        return all(child.poll() is None for child in self.children)

    def wait(self, limit=LIMIT):
        """Wait at most `limit` seconds, then kill all processes. Return their exit codes, None for those still running."""
        end = time.monotonic() + limit
        while any(child.poll() is None for child in self.children) and time.monotonic() < end:
            time.sleep(0.05)
        codes = [child.poll() for child in self.children]
        self.kill()
        return codes

    def kill(self):
        """Send SIGKILL to every process of the run and to its decoding processes."""
        for child in self.children:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()

    def lines(self):
        """Return the number of lines in metrics.jsonl."""
        try:
            return (self.workdir / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def until_random(self, draw):
        """Wait for a random moment of the start-up or after a random step. Return False if the run ended before."""
        if draw.random() < 0.3:
            return self._sleep(draw.uniform(0, 12))
        step = draw.randrange(STEPS)
        end = time.monotonic() + LIMIT
        while self.running() and self.lines() <= step and time.monotonic() < end:
            time.sleep(0.005)
        return self._sleep(draw.uniform(0, 0.4))

    def _sleep(self, seconds):
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.01)
        return self.running()

    def curve(self):
        """Return {step: train/loss}. Raise ValueError for a repeated step or a truncated line in metrics.jsonl."""
        found = {}
        for line in (self.workdir / "metrics.jsonl").read_text().splitlines():
            line = json.loads(line)
            if "train/loss" in line:
                if line["step"] in found:
                    raise ValueError(f"metrics.jsonl has step {line['step']} twice")
                found[line["step"]] = line["train/loss"]
        return found

    def log(self):
        """Return the text of the log."""
        return self._log.read_text(errors="replace")

    def remove(self):
        """Remove the workdir and the log."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        self._log.unlink(missing_ok=True)


def expected(place, **how):
    """Return the loss curve of the same run without interruption. `how`: arguments of `Run`."""
    run = Run(place, "whole", **how)
    run.start()
    codes = run.wait(600)
    if any(codes):
        raise RuntimeError(f"the uninterrupted run ended with exit codes {codes}: {run.log()[-2000:]}")
    curve = run.curve()
    run.remove()
    return curve


def differs(curve, other, rtol=0.0):
    """Return None if two loss curves are equal up to the relative tolerance, else the first difference."""
    if list(curve) != list(other):
        return f"{OTHER_STEPS} {list(curve)[:3]}...{list(curve)[-3:]}, not {list(other)[:3]}...{list(other)[-3:]}"
    for step, loss in other.items():
        if abs(curve[step] - loss) > rtol * abs(loss):
            return f"the loss at step {step} is {curve[step]!r}, not {loss!r}"
    return None


def seeded(*words):
    """Return a `random.Random` seeded by the arguments."""
    return random.Random(repr(words))
