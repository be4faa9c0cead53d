"""What a run writes of itself when it is done: its command, and the result.json of what was trained on an encoder."""

import json

import jax
from etils import epath

from qbheat_jax import atomic, console
from qbheat_jax.data import labels


def finished(path, summary):
    """Return what a run that was finished before this process began has written to `path`, or None.

    None too where the file is not there or is torn: it is then written anew.
    """
    try:
        return None if summary["steps_run"] else json.loads(epath.Path(path).read_text())
    except (OSError, ValueError):
        return None


def trained(config, summary):
    """The last fields of a result: of the encoder, and of the training as `loop.train` summed it up."""
    return {
        "encoder": config.encoder.name,
        "step": summary["step"],
        "image_size": config.image_size,
        "seconds": summary["seconds"],
        "images_per_second": summary["images_per_second"],
        "skipped_files": summary["skipped_files"],
        "command": console.command(),
    }


def save(workdir, result, class_names):
    """WORKDIR/result.json, and the names of what it tells apart; by process 0 alone."""
    if jax.process_index() == 0:
        labels.save(workdir, [(name, name) for name in class_names])
        atomic.write(epath.Path(workdir) / "result.json", json.dumps(result, indent=2) + "\n")
