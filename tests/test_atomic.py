"""Files that a run's readers depend on are whole whenever the process is killed."""

import os

import pytest

from qbheat_jax import atomic
from qbheat_jax.train import metrics


def test_what_was_there_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    atomic.write(path, "old")
    assert path.read_text() == "old"

    def killed(part, target):
        assert path.read_text() == "old" and open(part).read() == "new ü"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            atomic.write(path, "new ü")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic.write(path, b"\xff")
    assert path.read_bytes() == b"\xff"


def test_a_full_disk_leaves_what_was_there():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError):
        atomic.write("/dev/full/x", "")


def test_metrics_that_were_written_survive_the_start_of_the_next_run(tmp_path, monkeypatch):
    """A run that goes on rewrites its metrics without those after the checkpoint: killed within, none may be lost."""
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": step})
    writer.close()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        metrics.Writer(tmp_path, 2)
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 3]
