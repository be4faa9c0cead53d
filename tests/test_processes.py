"""Runs of several processes through the command line: killed and started again, stopped by SIGTERM, resumed elsewhere."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qbheat_jax import device_mesh, methods
from qbheat_jax.errors import PREEMPTED, RUN_FAILED, UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables, distributed, metrics, rendezvous
from qbheat_jax.train.checkpoint import Checkpoints
from tests.conftest import QUICKLY, SMALL

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
from qbheat_jax import cli
from qbheat_jax.train import metrics
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
    return config_tables.resolve({**FIELDS, **fields})


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
            **os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", "DEVICES": "4",
            "XLA_FLAGS": QUICKLY,
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


@pytest.fixture
def joined(monkeypatch):
    """The arguments of every `distributed._join`, in an environment that tells of no other process."""
    calls = []
    monkeypatch.setattr(distributed, "_join", lambda *arguments: calls.append(arguments))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_WORKER")) or name in distributed.VARIABLES.values():
            monkeypatch.delenv(name)
    return calls


def test_sigterm_ends_a_process_whatever_handler_the_devices_install(monkeypatch, joined):
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(jax, "devices", lambda: signal.signal(signal.SIGTERM, lambda *_: None))
        distributed.start()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_which_processes_there_are(monkeypatch, joined):
    distributed.start()
    distributed.start("host:1234", "1", "0")
    assert joined == [], "one process alone needs nobody"
    distributed.start("host:1234", "4", "3")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    distributed.start("host:1234", wait="7.5")
    assert joined == [("host:1234", 4, 3, None, distributed.WAIT), ("host:1234", 2, 0, None, 7.5)]
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert not distributed.several({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.several({"TPU_WORKER_HOSTNAMES": "a,b"}) and distributed.several({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(UserError) as caught:
        distributed.start("auto")  # there is nothing here that tells
    assert caught.value.exit_code == RUN_FAILED

    for words, arguments in (
        (
            r"needs --processes \(or JAX_NUM_PROCESSES\) and --process \(or JAX_PROCESS_ID\) too",
            ("host:1234", None, None),
        ),
        ("--processes 4 --process 4 ", ("host:1234", "4", "4")),
        ("--coordinator host --processes 2", ("host", "2", "0")),
        ("--processes two", ("host:1", "two", "0")),
        ("--wait soon", ("host:1", "2", "0", "soon")),
        ("--wait -1", ("host:1", "2", "0", "-1")),
    ):
        with pytest.raises(UserError, match=words):
            distributed.start(*arguments)


def test_slurm_counts_the_tasks_of_the_step(monkeypatch, joined):
    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    set_all(NTASKS="4", JOB_ID="9", PROCID="0", LOCALID="0")
    distributed.start()  # an allocation, outside of srun
    set_all(STEP_NODELIST="node[1-2]", STEP_NUM_TASKS="1")
    distributed.start()  # an interactive step: a shell in an allocation of four tasks
    distributed.start("auto")
    assert joined == []
    set_all(STEP_NUM_TASKS="2", PROCID="1", LOCALID="1")
    distributed.start()
    address, *others = joined.pop()
    assert address.startswith("node1:") and others == [2, 1, [1], distributed.WAIT]


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def connected(address):
    """A connection to who listens there, or will."""
    for _ in range(100):
        try:
            return socket.create_connection(rendezvous._split(address))
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def meet(address, count, numbers, seconds):
    """{number: what became of it}, of processes that are threads here."""
    found = {}

    def run(number):
        try:
            found[number] = rendezvous.meet(address, count, number, seconds)
        except UserError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_processes_meet_whatever_else_comes_by():
    address, found = free_address(), {}
    host = threading.Thread(target=lambda: found.update(meet(address, 3, (0,), 60)))
    host.start()
    connected(address).sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert meet(address, 3, (2, 1), 60) == {1: None, 2: None}
    host.join()
    assert found == {0: None}
    assert meet(address, 2, (0, 1), 60) == {0: None, 1: None}, "the port is free again at once"


@pytest.mark.parametrize("there, missing", [((0,), "processes 1, 2"), ((1,), "process 0"), ((0, 2), "process 1")])
def test_who_does_not_come_is_named(there, missing, caplog):
    caplog.set_level(logging.INFO, "qbheat")
    found = meet(free_address(), 3, there, 1.0)
    assert set(found) == set(there)
    for error in found.values():
        assert missing in str(error) and error.exit_code == RUN_FAILED
    assert all(f"process {number}" in caplog.text for number in there), "who waits says so"


def test_two_of_one_number_and_other_counts_are_refused():
    address = free_address()
    host = threading.Thread(target=lambda: found.update(meet(address, 3, (0,), 4.0)))
    found = {}
    host.start()
    first = connected(address)
    first.sendall(b'{"qbheat": 1, "of": 3}\n')
    time.sleep(0.2)
    assert "another number" in str(meet(address, 3, (1,), 60)[1])
    wrong = meet(address, 5, (4,), 60)[4]
    assert wrong.exit_code == RUN_FAILED and "4 of 5" in str(wrong)
    first.close()  # and one that has gone again counts no more
    host.join()
    assert "processes 1, 2" in str(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("arguments, environment", [
    (("--processes", "2", "--process", "0"), {}),
    (("--processes", "2", "--process", "1"), {}),
    ((), {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
          "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "4"}),
])  # fmt: skip
def test_a_process_that_waits_in_vain_ends_in_a_line(small_config_file, tmp_path, arguments, environment):
    if arguments:
        arguments = ("--coordinator", free_address(), *arguments)
    got = subprocess.run(
        [sys.executable, "-m", "qbheat_jax", "pretrain", "--config", str(small_config_file), "--workdir",
         str(tmp_path / "run"), *arguments, "--wait", "2"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip
    lines = got.stderr.strip().splitlines()
    assert got.returncode == RUN_FAILED and lines[-1].startswith("qbheat: error: ") and "Traceback" not in got.stderr
    assert sum("error" in line for line in lines) == 1 and any("wait" in line for line in lines[:-1])
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_join_are_one_line(monkeypatch):
    def unreachable(*_):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nmore")

    monkeypatch.setattr(rendezvous, "meet", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(UserError, match=r"cannot be joined at host:1 \(DEADLINE_EXCEEDED: no answer\)") as caught:
        distributed.start("host:1", "2", "0")
    assert caught.value.exit_code == RUN_FAILED


def test_rows_of_a_batch():
    mesh = device_mesh.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    np.testing.assert_array_equal(device_mesh.rows(mesh, 16), np.arange(16))
    batch = {"label": np.arange(16, dtype=np.int32)}
    placed = device_mesh.put_batch(batch, mesh)["label"]
    np.testing.assert_array_equal(placed, batch["label"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4,)}, "devices along model hold the same rows"
    assert methods.batch_spec(config_of()).shapes(16)["label"].shape == (16,)
