"""The lock of a workdir: one run at a time, on a disk and in a bucket; it ends with its holder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorstore

from qbheat_jax import cli
from qbheat_jax.errors import BAD_INPUT, RUN_FAILED, UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import lock

ROOT = Path(__file__).parent.parent

HOLD = """
import sys, time
from qbheat_jax.train import lock
lock.BEAT = 0.2
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, monkeypatch):
    """A folder, and the same behind a URL, of which tensorstore offers what it offers of a bucket."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    return str(tmp_path / "run") if request.param == "disk" else f"file://{tmp_path}/run"


def hold(workdir, seconds=100.0):
    """A process that holds the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir, str(seconds)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_killed(workdir):
    process = hold(workdir)
    with pytest.raises(UserError) as caught, lock.held(workdir):
        raise AssertionError("held by two")
    assert caught.value.exit_code == BAD_INPUT
    assert f"process {process.pid} on {os.uname().nodename}" in str(caught.value)
    process.kill()
    process.wait()
    with lock.held(workdir):  # nothing of the dead is in the way
        pass


def test_a_suspended_holder_of_a_disk_is_still_its_holder(tmp_path):
    process = hold(str(tmp_path))
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError), lock.held(tmp_path):
        raise AssertionError("held by two")
    process.kill()
    process.wait()


def test_it_is_given_back_after_errors_and_nested_folders_are_their_own(workdir):
    for _ in range(2):
        with pytest.raises(KeyError), lock.held(workdir), lock.held(f"{workdir}/cell"):
            with pytest.raises(UserError, match=str(os.getpid())), lock.held(workdir):
                raise AssertionError("held by two")
            raise KeyError


def test_of_many_at_once_one_gets_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.5)
    held, refused, begin, end = [], [], threading.Barrier(8), threading.Barrier(8)

    def run():
        begin.wait()
        try:
            with lock.held(f"file://{tmp_path}/run"):
                held.append(1)
                end.wait()
        except UserError:
            refused.append(1)
            end.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7


def test_a_holder_that_was_taken_for_dead_hears_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    lost = []
    first = lock._Beating("run", tensorstore.KvStore.open(f"file://{tmp_path}/run/").result(), lost.append)
    other = {"pid": 1, "host": "elsewhere", "since": "now"}
    (tmp_path / "run" / lock.FILE).write_text(json.dumps(other))
    for _ in range(100):
        if lost:
            break
        time.sleep(0.05)
    assert "process 1 on elsewhere" in str(lost[0])
    first.release()
    assert json.loads((tmp_path / "run" / lock.FILE).read_text()) == other, "it is no longer ours to give back"


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.held(tmp_path), lock.held(tmp_path):
        pass
    with lock.held("moon://bucket/run"):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text
    assert "moon://bucket/run cannot be locked" in caplog.text


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, lock.held(tmp_path / "file" / "run"):
        raise AssertionError("held")
    assert caught.value.exit_code == RUN_FAILED


def test_a_refused_run_touches_nothing(small_config, tmp_path, one_device):
    process = hold(str(tmp_path))
    with pytest.raises(UserError) as caught:
        pretrain.run(small_config(), tmp_path)
    assert caught.value.exit_code == BAD_INPUT
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
    process.kill()
    process.wait()
    assert pretrain.run(small_config(total_steps=1, warmup=0), tmp_path)["step"] == 1


@pytest.mark.parametrize("words", [
    ("probe", "--config", "configs/photos_lin.py", "--init", "pixels"),
    ("compare", "--config", "configs/compare/photos.py"),
    ("analyse", "--init", "random", "--data", "photos", "--config.encoder.name", "mobile_former_tiny",
     "--config.image_size", "64"),
])  # fmt: skip
def test_every_command_that_writes_results_heeds_it(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with lock.held(tmp_path):
        assert cli.main([*words, "--workdir", str(tmp_path)]) == BAD_INPUT
    assert str(os.getpid()) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
