"""How real processes end: a closed or full stdout, signals while nothing moves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qbheat_jax.errors import CLOSED, PREEMPTED, RUN_FAILED
from qbheat_jax.train import metrics
from qbheat_jax.train.checkpoint import Checkpoints
from tests.conftest import QUICKLY, SMALL

ROOT = Path(__file__).parent.parent

# The command `qbheat` with the tests' encoders.
COMMAND = """
import os, resource, sys
if __name__ == "__main__":
    largest = int(os.environ["LARGEST"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    flags = os.environ["XLA_FLAGS"]
    from tests import conftest
    os.environ["XLA_FLAGS"] = flags
    from qbheat_jax import __main__
    sys.exit(__main__.start())
"""
LONG = {"total_steps": 100000, "checkpoint_every": 100000, "log_every": 20, "decoder.depth": 0, "data.eval_split": ""}


@pytest.fixture
def images(tmp_path):
    """A folder of 32 JPEGs."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    for k in range(32):
        path = tmp_path / "images" / "train" / "ab"[k % 2] / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(noise, 7 * k, 1)).save(path)
    return tmp_path / "images"


@pytest.fixture
def start(tmp_path):
    """Function (fields) -> a pre-training run in tmp_path/run, started; its stderr is in tmp_path/log."""
    (tmp_path / "command.py").write_text(COMMAND)
    running = []

    def run(largest=-1, **fields):
        nested = {}
        for key, value in {**SMALL, **LONG, **fields}.items():
            *parents, leaf = key.split(".")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {nested!r}\n")
        environment = {**os.environ, "XLA_FLAGS": QUICKLY, "PYTHONPATH": str(ROOT)}
        environment |= {"LARGEST": str(largest)}
        command = [sys.executable, str(tmp_path / "command.py"), "pretrain"]
        arguments = ["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]
        with open(tmp_path / "log", "w") as log:
            running.append(subprocess.Popen([*command, *arguments], env=environment, cwd=ROOT, stderr=log))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def until(condition, process=None):
    for _ in range(1200):
        if condition():
            return
        assert process is None or process.poll() is None, process.returncode
        time.sleep(0.05)
    raise AssertionError("that took too long")


def steps(tmp_path):
    return [line["step"] for line in metrics.read(tmp_path / "run")]


def hang(tmp_path, process):
    """Put a pipe that nobody writes to in the place of an image, and wait until the run waits for it."""
    (image,) = tmp_path.glob("images/train/*/00.jpg")
    os.rename(image, tmp_path / "00.jpg")
    os.mkfifo(image)
    before = None
    while before != (before := steps(tmp_path)):
        time.sleep(1.5)
    assert process.poll() is None


@pytest.mark.parametrize("command", ["--version", "doctor"])
def test_a_reader_that_is_gone_is_a_silent_end(command):
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    got = subprocess.run(
        [sys.executable, "-m", "qbheat_jax", command],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    os.close(write)
    assert got.returncode == CLOSED and got.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        got = subprocess.run(
            [sys.executable, "-m", "qbheat_jax", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert got.returncode == RUN_FAILED
    assert got.stderr == "qbheat: error: stdout cannot be written: No space left on device\n"


def test_a_checkpoint_that_the_disk_refuses_is_one_line(start, tmp_path):
    """A limit on the size of files stands in for a full disk: the threads of orbax fail, and many of them at once."""
    process = start(20_000, **{"total_steps": 4, "checkpoint_every": 1, "data.source": "synthetic:64"})
    assert process.wait(120) == RUN_FAILED
    log = (tmp_path / "log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("qbheat: error")]
    assert len(errors) == 1 and "cannot be written" in errors[0] and "Traceback" not in log


STUCK = """
import hashlib, sys
from qbheat_jax import console
console.HEAR = 0.5
with console.Program() as program:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", 10**8)  # minutes within C, as a compiler
"""


def test_an_interrupt_that_the_main_thread_does_not_hear():
    got = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert got.stdout.readline() == "ready\n"
    time.sleep(1)
    got.send_signal(signal.SIGINT)
    _, said = got.communicate(timeout=30)
    assert got.returncode == RUN_FAILED and said.startswith("qbheat: error: interrupted") and said.count("\n") == 1


def test_sigterm_before_the_first_step_simply_ends_the_process(start, tmp_path):
    process = start(**{"data.source": "synthetic:64"})
    until((tmp_path / "run" / "config.json").exists, process)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


@pytest.mark.slow
def test_signals_while_a_file_cannot_be_read(start, images, tmp_path):
    fields = {"data.source": f"folder:{images}"}
    process = start(**fields)
    until(lambda: len(steps(tmp_path)) > 3, process)
    hang(tmp_path, process)
    process.terminate()
    assert process.wait(60) == PREEMPTED
    (saved,) = Checkpoints(tmp_path / "run").steps()
    assert f"stopped by SIGTERM at step {saved} of" in (tmp_path / "log").read_text()
    assert steps(tmp_path)[-1] == saved, "the last steps are told too"

    # The folder is listed before the image is a pipe again.
    os.replace(tmp_path / "00.jpg", images / "train" / "a" / "00.jpg")
    process = start(**fields)
    until(lambda: "resuming" in (tmp_path / "log").read_text(), process)
    until(lambda: steps(tmp_path)[-1] > saved, process)
    hang(tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == RUN_FAILED
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("qbheat: error: interrupted")


@pytest.mark.slow
def test_of_two_runs_in_a_workdir_the_second_ends_and_the_first_goes_on(start, tmp_path):
    first = start(**{"data.source": "synthetic:64"})
    until(lambda: steps(tmp_path), first)
    second = start(**{"data.source": "synthetic:64"})
    assert second.wait(60) == 2 and str(first.pid) in (tmp_path / "log").read_text()
    told = steps(tmp_path)
    until(lambda: len(steps(tmp_path)) > len(told), first)
    first.terminate()
    assert first.wait(60) == PREEMPTED
    assert steps(tmp_path) == sorted(set(steps(tmp_path)))
    assert Checkpoints(tmp_path / "run").steps() == steps(tmp_path)[-1:]
