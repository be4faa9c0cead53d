"""Read and write the result.json of a run that trains on an encoder."""

import json

import jax
from etils import epath

from qbheat_jax import atomic, console
from qbheat_jax.data import labels


def finished(path, summary):
    """Return the result in `path` of a run that an earlier process finished.

    None where this process ran steps, and where the file is missing or torn: it is then written again.
    """
    try:
        return None if summary["steps_run"] else json.loads(epath.Path(path).read_text())
    except (OSError, ValueError):
        return None


def trained(config, summary):
    """Return the last fields of a result: the encoder's, and those of `loop.train`'s summary."""
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
    """Write WORKDIR/result.json and the names of the classes, in process 0 alone."""
    if jax.process_index() == 0:
        labels.save(workdir, [(name, name) for name in class_names])
        atomic.write(epath.Path(workdir) / "result.json", json.dumps(result, indent=2) + "\n")
