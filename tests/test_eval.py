"""The one evaluator: the same numbers on one device, on four and in two processes, each example counted once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import data, device_mesh
from qbheat_jax.errors import UserError
from qbheat_jax.eval import evaluate
from qbheat_jax.eval.accuracy import Accuracy, ranks, top
from qbheat_jax.tasks import detect, finetune, pretrain
from qbheat_jax.train import config_tables, metrics
from tests import eval_worker
from tests import test_tasks_detect as detection
from tests import test_tasks_finetune as finetuning
from tests.conftest import SMALL, interrupt_after_save
from tests.probe_data import Blobs

ROOT = Path(__file__).parent.parent


def leave(monkeypatch, count):
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(folder, [what each measured]) of two processes of one device each, see `eval_worker.main`."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for index in ("0", "1"):
        command = [sys.executable, "-m", "tests.eval_worker", address, "2", index, str(folder)]
        with open(folder / f"{index}.log", "w") as log:
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"{index}.log").read_text()[-3000:] for index in (0, 1))
    return folder, [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]


def assert_alike(got, expected):
    """Equal structure, numbers equal to rounding; corners of boxes are rounded to hundredths of a pixel."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for name in expected:
        atol = 0.02 if name == "detections" else 1e-6
        np.testing.assert_allclose(
            jax.tree.leaves(got[name]), jax.tree.leaves(expected[name]), rtol=1e-4, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("name", eval_worker.METRICS)
def test_devices_processes_and_batches_do_not_change_a_metric(together, monkeypatch, name):
    with monkeypatch.context() as patch:
        leave(patch, 1)
        expected = eval_worker.measure(name)
        other = eval_worker.measure(name, batch_size=7)
    alike = [name for name in expected if not name.endswith("variance")]  # which is of a batch
    assert_alike({name: other[name] for name in alike}, {name: expected[name] for name in alike})
    assert expected["n"] == {"average_precision": 19, "online": 75}.get(name, 41) and expected["n"] % 16
    leave(monkeypatch, 4)
    assert_alike(eval_worker.measure(name, fsdp=2), expected)
    if name != "average_precision":  # boxes have no cache; their AP in two processes is in the next test
        assert_alike(eval_worker.measure(name, fsdp=2, cached=True), expected)
        for measured in together[1]:
            assert_alike(measured[name], expected)


def test_two_processes_that_share_a_detector_measure_its_ap(together, tmp_path, monkeypatch):
    """During training and after it, with variables that no process holds whole."""
    leave(monkeypatch, 2)
    monkeypatch.setattr(data, "open_source", lambda *_, **__: detection.Squares())
    expected = detect.run(detection.config(**eval_worker.DETECTOR), tmp_path)
    folder, measured = together
    assert measured[0]["detect"]["AP"] == measured[1]["detect"]["AP"]
    for name in ("AP", "AP50", "AP75", "n", "step"):
        assert measured[0]["detect"][name] == pytest.approx(expected[name], abs=1e-3), name
    aps = [[line["val/AP"] for line in metrics.read(w) if "val/AP" in line] for w in (folder / "detect", tmp_path)]
    assert len(aps[0]) == 2
    np.testing.assert_allclose(*aps, atol=1e-3)


def test_two_processes_test_a_classifier(together, tmp_path, monkeypatch):
    leave(monkeypatch, 2)
    monkeypatch.setattr(data, "open_source", lambda *_, **__: Blobs())
    expected = finetune.run(
        finetuning.config(encoder__name="pebble", layer_decay=1.0, mesh__fsdp=2, eval_every=1), tmp_path
    )
    for name in ("top1", "top5", "n", "chance", "holdout_top1"):
        assert together[1][0]["finetune"][name] == pytest.approx(expected[name]), name


def test_variables_are_split_as_in_training(monkeypatch):
    leave(monkeypatch, 4)
    mesh = device_mesh.make_mesh({"data": 2, "fsdp": 2})
    _, variables = eval_worker.evaluator("average_precision", 2)
    placed = evaluate.place(variables, mesh)
    assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(placed["params"]["detector"]))
    jax.tree.map(np.testing.assert_array_equal, placed, variables)
    again = evaluate.place(placed, mesh)
    assert all(a is b for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(again)))


@pytest.mark.parametrize("cached", [False, True])
def test_evaluations_of_a_run_share_one_program(tmp_path, monkeypatch, cached):
    """Also those of a run that was resumed, and after training."""
    made, make = [], pretrain.validation

    def keep(*arguments):
        made.append(make(*arguments))
        return made[-1]

    leave(monkeypatch, 2)
    monkeypatch.setattr(pretrain, "validation", keep)
    monkeypatch.setattr(data, "open_source", lambda *_, **__: Blobs())
    fields = {"mesh.fsdp": 2, "eval_every": 1, "checkpoint_every": 1, "data.device_cache": cached, "decoder.width": 32}
    config = config_tables.resolve({**SMALL, **fields, "total_steps": 4})
    interrupt_after_save(monkeypatch, pretrain.loop.Checkpoints, 2, lambda: pretrain.run(config, tmp_path))
    pretrain.run(config, tmp_path)
    assert len(made) == 2 and [evaluator._step._cache_size() for evaluator in made] == [1, 1]
    assert [line["step"] for line in metrics.read(tmp_path) if "val/loss" in line] == [1, 2, 3, 4]


def test_images_without_a_label_or_that_cannot_be_read_are_refused(monkeypatch):
    leave(monkeypatch, 1)

    class Some(Blobs):
        def __init__(self, good, labelled):
            super().__init__()
            self._good, self._known = good, labelled

        def fetch(self, split, index):
            if index not in self._good:
                raise OSError(5, "damaged", f"{split}[{index}]")
            image, label, name = super().fetch(split, index)
            return image, label if self._known else -1, name

    evaluator, variables = eval_worker.evaluator("accuracy")
    objective = evaluator._metric._objective

    def of(source, **fields):
        metric = Accuracy(objective, source, "test", 4)
        return evaluate.Evaluator(
            metric, source, "test", device_mesh.make_mesh({}), data.ImageSpec(32), batch_size=16, **fields
        )

    seen = of(Some((3, 5, 17), True))
    seen(variables)
    assert (seen.measured.n, seen.measured.skipped) == (3, 38) and seen.measured.details["chance"] == 2 / 3
    for evaluator, words in (
        (of(Some((), True)), "no image that can be read"),
        (of(Some((3, 20), False)), "1 images have no label"),
        (of(Some((3, 5), True), max_bad_fraction=0.5), "max_bad_fraction=0.5"),
    ):
        with pytest.raises(UserError, match=words):
            evaluator(variables)


def test_ranks_count_ties_and_nan_against_the_model():
    logits = np.array([[3.0, 2, 1], [1, 1, 1], [np.nan, 0, 1], [np.nan] * 3, [np.inf, np.inf, 0]], np.float32)
    labels = np.array([1, 0, 0, 2, 0])
    for scores in (logits, jnp.asarray(logits)):
        assert ranks(scores, labels).tolist() == [1, 2, 2, 2, 1]
    each = np.stack([logits, logits + 1], 1)
    np.testing.assert_array_equal(ranks(each, labels), np.stack([ranks(logits, labels)] * 2, 1))
    assert top(np.array([0, 1, 5])) == {"top1": 1 / 3, "top5": 2 / 3}
