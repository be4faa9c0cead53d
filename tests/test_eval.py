"""The one evaluator: the same numbers on one device, on four and in two processes, each example counted once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qbheat_jax import data
from qbheat_jax.tasks import detect
from qbheat_jax.train import metrics
from tests import eval_worker
from tests import test_tasks_detect as detection

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of two processes of one device each, `eval_worker.main`."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.eval_worker", address, "2"]
    logs = [open(folder / f"{index}.log", "w") for index in (0, 1)]
    running = [
        subprocess.Popen([*command, str(i), str(folder)], cwd=ROOT, stdout=logs[i], stderr=logs[i], text=True)
        for i in (0, 1)
    ]
    try:
        codes = [process.wait(240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"{index}.log").read_text()[-3000:] for index in (0, 1))
    return folder


def test_two_processes_that_share_a_detector_measure_its_ap(together, tmp_path, monkeypatch):
    """During training and after it, with variables that no process holds whole."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(data, "open_source", lambda *_, **__: detection.Squares())
    expected = detect.run(detection.config(**eval_worker.DETECTOR), tmp_path)
    measured = json.loads((together / "measured.json").read_text())["detect"]
    for name in ("AP", "AP50", "AP75", "n", "step"):
        assert measured[name] == pytest.approx(expected[name], abs=1e-3), name
    aps = [[line["val/AP"] for line in metrics.read(w) if "val/AP" in line] for w in (together / "detect", tmp_path)]
    assert len(aps[0]) == 2
    np.testing.assert_allclose(*aps, atol=1e-3)
