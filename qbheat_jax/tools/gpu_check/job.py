"""The interface of a job: its sizes, its result, and its turns for timing."""

import contextlib
import json
import os
import pathlib
import time


class Job:
    """A job, as seen from its own process.

    Attributes:
      name: Name of the job.
      sizes: The `Sizes`.
      folder: `pathlib.Path` of an existing folder for its files.
      result: Dict of findings so far, which `save` writes. The job fails if its list "problems" is not empty.
    """

    def __init__(self, name, sizes, folder):
        self.name, self.sizes, self.folder = name, sizes, pathlib.Path(folder)
        self.result = {"problems": []}

    def save(self, **found):
        """Add findings to the result and write it to the disk."""
        self.result |= found
        replace(self.folder / "result.json", json.dumps(self.result, indent=2) + "\n")

    @contextlib.contextmanager
    def turn(self):
        """Wait until no other job is timed, and pause the other jobs during the `with` block."""
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
    """Write a file atomically: a reader sees the old or the new text."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def losses(workdir):
    """Return the training losses in a run's metrics.jsonl, in order."""
    from qbheat_jax.train import metrics  # imports jax, which a job must configure first

    return [line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line]
