"""One of several processes that evaluate together: `python -m tests.eval_worker HOST:PORT COUNT INDEX FOLDER`.

Each leaves what it measured in FOLDER/INDEX.json; they leave the run of a detector in FOLDER/detect.
"""

import json
import os
import pathlib
import sys

import jax
import numpy as np

from qbheat_jax import config as config_lib
from qbheat_jax import data, methods
from qbheat_jax.eval.accuracy import Accuracy
from qbheat_jax.eval.average_precision import AveragePrecision
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.eval.label_free import LabelFree
from qbheat_jax.probe import online
from qbheat_jax.tasks import detect, finetune
from qbheat_jax.train import config_tables, distributed
from qbheat_jax.train.config_tables import PRETRAIN
from tests import conftest
from tests import test_tasks_detect as detection
from tests import test_tasks_finetune as finetuning
from tests.probe_data import Blobs

# Large enough that the detector's kernels are split over fsdp.
DETECTOR = {"dense__width": 32, "mesh__fsdp": 2}
METRICS = ("accuracy", "average_precision", "label_free", "online")


def evaluator(name, fsdp=1, batch_size=16, cached=False):
    """(the `Evaluator` of a metric on a split of 19 or 41 images, the variables of an untrained model as numpy arrays)."""
    shared = {"mesh__fsdp": fsdp, "batch_size": batch_size}
    if name == "average_precision":
        source, split = detection.Squares(), "val"
        config = detection.config(**{**DETECTOR, **shared, "detector__classes": 2})
        objective = methods.build(config)
        metric = AveragePrecision(objective, source, split)
    elif name == "accuracy":
        source, split = Blobs(), "test"
        config = finetuning.config(**shared, encoder__name="pebble", head__classes=4, data__device_cache=cached)
        objective = methods.build(config)
        metric = Accuracy(objective, source, split, 4)
    else:
        source, split = Blobs(), "test"
        fields = {"mesh.fsdp": fsdp, "batch_size": batch_size, "decoder.width": 32, "data.device_cache": cached}
        config = config_tables.resolve({**conftest.SMALL, **fields})
        objective = methods.build(config)
        metric = LabelFree(objective) if name == "label_free" else None
    batch = {
        "image": np.zeros((2, 32, 32, 3), np.uint8),
        "quarter": np.zeros(2, np.int32),
        "label": np.zeros(2, np.int32),
        "mask": np.ones(2, bool),
    }
    variables = jax.device_get(jax.jit(objective.init)(jax.random.key(0), batch))
    if metric is None:
        fields = {"monitors.images": 75, "monitors.views": 2, "monitors.probes": "knn,lin"}
        return online.of_run(
            config_lib.resolve({**config_lib.flatten(config), **fields}, PRETRAIN), objective, source
        ), variables
    return Evaluator.of_run(metric, source, split, config), variables


def measure(name, fsdp=1, batch_size=16, cached=False):
    """What a metric measures, as JSON takes it."""
    run, variables = evaluator(name, fsdp, batch_size, cached)
    figures = run(variables)
    return json.loads(json.dumps({**figures, "n": run.measured.n, **run.measured.details}))


def main(address, count, index, folder):
    os.environ["XLA_FLAGS"] = conftest.FLAGS.replace("device_count=8", "device_count=1")  # jax has not started yet
    distributed.start(address, count, index)
    folder, sources = pathlib.Path(folder), {"squares": detection.Squares(), "blobs": Blobs()}
    data.open_source = lambda spec, **_: sources[spec]
    measured = {name: measure(name, fsdp=2) for name in METRICS if name != "average_precision"}
    measured["detect"] = detect.run(detection.config(**DETECTOR), folder / "detect")
    tuned = finetuning.config(encoder__name="pebble", mesh__fsdp=2, eval_every=1, layer_decay=1.0)
    measured["finetune"] = finetune.run(tuned, folder / "finetune")
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
