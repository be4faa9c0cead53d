"""One of several processes that evaluate together: `python -m tests.eval_worker HOST:PORT COUNT INDEX FOLDER`.

Process 0 leaves what it measured in FOLDER/measured.json and the run of a detector in FOLDER/detect.
"""

import json
import os
import pathlib
import sys

import jax

from qbheat_jax import data
from qbheat_jax.tasks import detect
from qbheat_jax.train import distributed
from tests import conftest
from tests import test_tasks_detect as detection

# Large enough that the detector's kernels are split over fsdp.
DETECTOR = {"dense__width": 32, "mesh__fsdp": 2}


def main(address, count, index, folder):
    os.environ["XLA_FLAGS"] = conftest.FLAGS.replace("device_count=8", "device_count=1")  # jax has not started yet
    distributed.start(address, count, index)
    data.open_source = lambda *_, **__: detection.Squares()
    folder = pathlib.Path(folder)
    measured = {"detect": detect.run(detection.config(**DETECTOR), folder / "detect")}
    if jax.process_index() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
