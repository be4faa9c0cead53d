"""What a job is given: where its results go, and when it is its turn to be timed."""

import contextlib
import json
import os
import pathlib
import time


class Job:
    """One job, from inside its process.

    Attributes:
      name: Of the job.
      sizes: `Sizes`.
      folder: For its files, already there.
      result: What it has found so far; `save` writes it. "problems" is a list of sentences: with any, the job has failed.
    """

    def __init__(self, name, sizes, folder):
        self.name, self.sizes, self.folder = name, sizes, pathlib.Path(folder)
        self.result = {"problems": []}

    def save(self, **found):
        """Add to the result and write it, so that it outlives the process."""
        self.result |= found
        replace(self.folder / "result.json", json.dumps(self.result, indent=2) + "\n")

    @contextlib.contextmanager
    def turn(self):
        """Wait until nobody else is timed; no other job runs until it ends."""
        ready, go = self.folder / "ready", self.folder / "go"
        ready.touch()
        while not go.exists():
            time.sleep(0.02)
        try:
            yield
        finally:
            ready.unlink()
            go.unlink()


def replace(path, text):
    """Write a file in one go: a reader sees the old text or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def losses(workdir):
    """The losses of a run's metrics.jsonl, in order."""
    from qbheat_jax.train import metrics  # brings jax, which a job sets up first

    return [line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line]
