"""Runs of several processes through the command line: killed and started again, stopped by SIGTERM, resumed elsewhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qbheat_jax import config as config_lib
from qbheat_jax import distributed, loop, metrics, pretrain, sharding
from qbheat_jax.checkpoint import Checkpoints
from qbheat_jax.errors import PREEMPTED, UserError
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
FIELDS = {
    **SMALL, "encoder.name": "pebble", "decoder.depth": 0, "data.eval_split": "", "total_steps": 12, "mesh.fsdp": 2,
    "log_every": 1, "checkpoint_every": 4, "keep": 9,
}  # fmt: skip

# The command `qbheat` with the tests' encoders; after step HOLD it waits for the file GO, so that there is a middle to hit.
COMMAND = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
flags = os.environ["XLA_FLAGS"]
from tests import conftest
os.environ["XLA_FLAGS"] = flags
from qbheat_jax import cli, metrics
advance = metrics.Progress.advance
def held(self, step):
    advance(self, step)
    while str(step) == os.environ["HOLD"] and not os.path.exists(os.environ["GO"]):
        time.sleep(0.05)
metrics.Progress.advance = held
sys.exit(cli.main())
"""


def losses(workdir):
    return {line["step"]: line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line}


def config_of(**fields):
    return config_lib.resolve({**FIELDS, **fields})


def assert_same_curve(workdir, expected):
    got = losses(workdir)
    assert list(got) == list(expected), "every step is told once, in order"
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The loss curve of an uninterrupted run, one process of eight devices."""
    workdir = tmp_path_factory.mktemp("whole")
    pretrain.run(config_of(), workdir)
    assert list(losses(workdir)) == list(range(1, 13))
    return losses(workdir)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Function (workdir, hold) -> two processes of four devices each under launch/local_processes.sh, started."""
    place = tmp_path_factory.mktemp("two")
    (place / "qbheat").write_text(COMMAND.format(python=sys.executable, root=str(ROOT)))
    (place / "qbheat").chmod(0o755)
    nested = config_of().to_dict()
    (place / "config.py").write_text(f"def get_config():\n    return {nested!r}\n")

    def start(workdir, hold=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "XLA_FLAGS": "", "DEVICES": "4",
            "LOGS": str(place / "logs"), "PORT": port, "HOLD": str(hold), "GO": str(place / "go"),
            "JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        command = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2", "pretrain"]
        arguments = ["--config", str(place / "config.py"), "--workdir", str(workdir)]
        return subprocess.Popen([*command, *arguments], env=environment, cwd=ROOT)

    start.stay = (place / "go").unlink
    start.go = (place / "go").touch
    start.logs = lambda n: (place / "logs" / f"{n}.log").read_text()
    return start


def wait_for(running, condition):
    for _ in range(2400):
        if condition():
            return
        assert running.poll() is None, f"it ended with {running.returncode}"
        time.sleep(0.05)
    raise AssertionError("that took too long")


def children(running):
    """The process ids of the two, number 0 first."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            parent = re.search(r"PPid:\s*(\d+)", (path / "status").read_text())[1]
        except OSError:
            continue
        if int(parent) == running.pid and "--process" in words:
            found[int(words[words.index("--process") + 1])] = int(path.name)
    return [found[n] for n in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")
def test_two_processes_stopped_killed_and_started_again(whole, processes, tmp_path, monkeypatch):
    run = tmp_path / "run"

    # SIGTERM to one of them alone: both finish the same step, save, and say so by their exit code.
    running = processes(run, hold=2)
    wait_for(running, lambda: 1 in losses(run))
    os.kill(children(running)[1], signal.SIGTERM)
    processes.go()
    assert running.wait(300) == PREEMPTED, processes.logs(0)
    assert list(losses(run)) == [1, 2, 3] and Checkpoints(run).steps() == [3]
    assert "stopped by SIGTERM at step 3 of 12" in processes.logs(0)
    assert "resuming" not in processes.logs(1) and "parameters" not in processes.logs(1), "process 0 speaks for all"

    # SIGKILL: the other one is ended too, and nothing is saved on the way out.
    processes.stay()
    running = processes(run, hold=9)
    wait_for(running, lambda: 8 in losses(run) and (run / "checkpoints" / "8").exists())
    os.kill(children(running)[1], signal.SIGKILL)
    assert running.wait(300) == 128 + signal.SIGKILL
    assert f"resuming {run} at step 3 of 12" in processes.logs(0)
    assert Checkpoints(run).steps()[-1] == 8 and json.loads((run / "config.json").read_text())["total_steps"] == 12

    for count in (4, 8):  # elsewhere: one process of so many devices
        shutil.copytree(run, tmp_path / str(count))
        devices = jax.devices()[:count]
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_, devices=devices: devices)
            assert pretrain.run(config_of(), tmp_path / str(count))["steps_run"] == 4
        assert_same_curve(tmp_path / str(count), whole)

    # What a pod has trained is a model for one device too.
    code = "import sys, qbheat_jax, jax; print(jax.device_count(), qbheat_jax.load(sys.argv[1]).step)"
    alone = "from tests import conftest; import os; os.environ['XLA_FLAGS'] = ''; "
    got = subprocess.run([sys.executable, "-c", alone + code, str(run)], capture_output=True, text=True, cwd=ROOT)
    assert got.stdout.split() == ["1", "8"], got.stderr

    running = processes(run)
    assert running.wait(300) == 0, processes.logs(0)
    assert_same_curve(run, whole)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 12 and processes.logs(0).count('"steps_run": 4') == 1
    assert "steps_run" not in processes.logs(1)


def test_sigterm_saves_and_the_next_start_loses_nothing(whole, tmp_path, monkeypatch):
    advance = metrics.Progress.advance

    def stopped_at_three(self, step):
        advance(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "advance", stopped_at_three)
        with pytest.raises(UserError, match="stopped by SIGTERM at step 3 of 12, which is saved") as caught:
            pretrain.run(config_of(), tmp_path)
    assert caught.value.exit_code == PREEMPTED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert Checkpoints(tmp_path).steps() == [3] and list(losses(tmp_path)) == [1, 2, 3]
    assert pretrain.run(config_of(), tmp_path)["steps_run"] == 9
    assert_same_curve(tmp_path, whole)


def test_which_processes_there_are(monkeypatch):
    joined = []
    monkeypatch.setattr(distributed, "_join", lambda *arguments: joined.append(arguments))
    for name in (*distributed.VARIABLES.values(), "SLURM_STEP_NODELIST", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    distributed.start("host:1234", "1", "0")
    assert joined == [], "one process alone needs nobody"
    distributed.start("host:1234", "4", "3")
    distributed.start("auto")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    distributed.start("host:1234")
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    monkeypatch.delenv("JAX_PROCESS_ID")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    distributed.start()  # an allocation, outside of srun: this process alone
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    distributed.start()
    assert joined == [("host:1234", 4, 3), (), ("host:1234", 2, 0), ()]
    monkeypatch.delenv("SLURM_NTASKS")
    assert not distributed.several({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.several({"TPU_WORKER_HOSTNAMES": "a,b"}) and distributed.several({"OMPI_COMM_WORLD_SIZE": "2"})

    for words, arguments in (
        (r"needs --processes \(or JAX_NUM_PROCESSES\) and --process \(or JAX_PROCESS_ID\) too", ("host:1234", None, None)),
        ("--process 4 is not accepted: it takes HOST:PORT of process 0", ("host:1234", "4", "4")),
        ("--coordinator host --processes 2", ("host", "2", "0")),
        ("--processes two", ("host:1", "two", "0")),
    ):
        with pytest.raises(UserError, match=words):
            distributed.start(*arguments)


def test_processes_that_cannot_meet_are_one_line(monkeypatch):
    def unreachable(*_):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(UserError, match=r"cannot be joined at host:1 \(DEADLINE_EXCEEDED: no answer\)") as caught:
        distributed.start("host:1", "2", "0")
    assert caught.value.exit_code == 1


def test_rows_of_a_batch():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    np.testing.assert_array_equal(sharding.rows(mesh, 16), np.arange(16))
    batch = {"label": np.arange(16, dtype=np.int32)}
    placed = sharding.put_batch(batch, mesh)["label"]
    np.testing.assert_array_equal(placed, batch["label"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4,)}, "devices along model hold the same rows"
    assert loop.batch_shapes(config_of())["label"].shape == (16,)
