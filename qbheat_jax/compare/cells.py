"""Read the folders of cells: finished results, and conflicts with another config."""

import json

from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError

# Prefixes of the fields that a detector's run adds to its config.
_ADDED_FIELDS = ("init", "encoder.", "pixels", "detector.classes")


def result(cell, workdir):
    """Return the result of a finished cell.

    Args:
      cell: A `plan.Cell`.
      workdir: `epath.Path` of the comparison.

    Returns:
      The dict in result.json of a probe or in summary.json of a run; None for an unfinished cell.
    """
    folder = workdir / cell.path
    if cell.probe:
        return _json(folder / "result.json")
    summary = _json(folder / "summary.json")
    steps = cell.method.steps
    finished = summary and summary.get("step") == steps and (folder / "checkpoints" / str(steps)).exists()
    return summary if finished else None


def check_workdir(cells, workdir):
    """Check that no cell's folder holds results of another config.

    Args:
      cells: List of `plan.Cell`.
      workdir: `epath.Path` of the comparison.

    Raises:
      UserError: A folder holds a result or a checkpoint of another config.
    """
    for cell in cells:
        folder = workdir / cell.path
        saved = _json(folder / "config.json")
        # A run without a checkpoint may be overwritten.
        held = (folder / "result.json").exists() if cell.probe else any((folder / "checkpoints").glob("[0-9]*"))
        differ = held and saved and config_lib.differing(saved, cell.config, cell.table)
        if differ and cell.detects:
            differ = [one for one in differ if not one[0].startswith(_ADDED_FIELDS)]
        if differ:
            words = ", ".join(f"{key}={old!r} (now {new!r})" for key, old, new in differ[:5])
            raise UserError(
                f"--workdir {workdir} holds another comparison: {cell.path} has {words}; use another --workdir, restore that "
                "config, or remove that folder"
            )


def _json(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or truncated
        return None
    return found if isinstance(found, dict) else None
