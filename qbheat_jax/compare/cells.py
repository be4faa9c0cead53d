"""What the folders of cells hold: results that are there already, and runs of other configs."""

import json

from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError

# What a detector's run adds to the config that it was given.
_BROUGHT = ("init", "encoder.", "pixels", "detector.classes")


def result(cell, workdir):
    """What a finished cell left, the result.json of a probe or the summary.json of a run, as a dict; None before that."""
    folder = workdir / cell.path
    if cell.probe:
        return _json(folder / "result.json")
    summary = _json(folder / "summary.json")
    steps = cell.method.steps
    finished = summary and summary.get("step") == steps and (folder / "checkpoints" / str(steps)).exists()
    return summary if finished else None


def claim(cells, workdir):
    """Raises UserError where the folder of a cell holds something of another config."""
    for cell in cells:
        folder = workdir / cell.path
        saved = _json(folder / "config.json")
        # As for a run by itself: one without a checkpoint has nothing to lose.
        held = (folder / "result.json").exists() if cell.probe else any((folder / "checkpoints").glob("[0-9]*"))
        differ = held and saved and config_lib.differing(saved, cell.config, cell.table)
        if differ and cell.detects:
            differ = [one for one in differ if not one[0].startswith(_BROUGHT)]
        if differ:
            words = ", ".join(f"{key}={old!r} (now {new!r})" for key, old, new in differ[:5])
            raise UserError(
                f"--workdir {workdir} holds another comparison, of which {cell.path} has {words}: take another --workdir, "
                "that config, or remove that folder"
            )


def _json(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or torn
        return None
    return found if isinstance(found, dict) else None
