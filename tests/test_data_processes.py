"""Decoding in other processes: the same batches, the same bad files, and an end to them however the run ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import data
from qbheat_jax.data import processes
from qbheat_jax.errors import RUN_FAILED, UserError
from tests.batches import train_batches

ROOT = pathlib.Path(__file__).parents[1]

HOW = {
    "split": "train", "batch_size": 20, "image_size": 32, "seed": 0, "placements": (0, 2, 4), "crop_scale": (0.2, 1.0),
    "crop_ratio": (0.75, 4 / 3), "flip": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images, JPEG of noise or PNG, of which two cannot be read: one is torn and one is gone."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    for k in range(40):
        place = root / "train" / "ab"[k % 2] / f"{k:02}.{('jpg', 'png')[k % 3 == 0]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(noise, 7 * k, 1)).save(place)
    (torn, gone) = (root / "train" / "a" / name for name in ("02.jpg", "04.jpg"))
    torn.write_bytes(torn.read_bytes()[:900])
    source = data.open_source(f"folder:{root}")
    gone.unlink()
    return source


def batches(source, count, **how):
    bad = data.BadFiles(0.1, 40)
    iterator = train_batches(source, bad=bad, **{**HOW, **how})
    try:
        return [next(iterator) for _ in range(count)], set(bad.names)
    finally:
        iterator.close()


def test_batches_and_bad_files_are_those_of_threads(folder, monkeypatch):
    monkeypatch.setattr(processes, "_ENCODED", 9000)  # so that some files do not fit, and go through a pipe
    sizes = [os.path.getsize(path) for path in folder._files["train"] if os.path.exists(path)]
    assert min(sizes) < 9000 < max(sizes)
    ours, bad = batches(folder, 4, processes=2, views=2, position=20)
    expected, expected_bad = batches(folder, 4, workers=2, views=2, position=20)
    assert bad == expected_bad and len(bad) == 2
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], key)


def test_evaluation_fills_its_last_batch(folder):
    how = {"split": "train", "batch_size": 30, "image_size": 32, "seed": 0}
    ours, expected = (list(data.eval_batches(folder, **how, **way)) for way in ({"processes": 2}, {"workers": 2}))
    assert [batch["mask"].sum() for batch in ours] == [batch["mask"].sum() for batch in expected]
    assert sum(batch["mask"].sum() for batch in ours) == 38
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_a_process_that_dies_ends_the_run_in_a_line(folder):
    iterator = train_batches(folder, processes=2, **HOW)
    next(iterator)
    for process in iterator._work.decoders.processes:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that decodes images has died.*data.processes") as caught:
        for _ in range(100):
            next(iterator)
    assert caught.value.exit_code == RUN_FAILED and "\n" not in str(caught.value)
    iterator.close()


RUN = """
import sys, time
from qbheat_jax import data
from tests.batches import train_batches

if __name__ == "__main__":
    iterator = train_batches(data.open_source(sys.argv[1]), processes=2, **eval(sys.argv[2]))
    next(iterator)
    print(*(p.pid for p in iterator._work.decoders.processes), flush=True)
    time.sleep(100)
"""


def test_processes_end_with_the_run_that_is_killed(folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    run = subprocess.Popen(
        [sys.executable, script, folder.spec, repr(HOW)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    numbers = [int(number) for number in run.stdout.readline().split()]
    assert len(numbers) == 2 and all(map(alive, numbers))
    run.kill()
    run.wait()
    until = time.monotonic() + 30
    while any(map(alive, numbers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, numbers))


def alive(number):
    """Whether a process of that number runs, and is not one that only waits to be counted."""
    try:
        with open(f"/proc/{number}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
