"""One self-contained HTML page about a run: pictures, curves, probes, what A and B learnt, how to repeat it."""

import pathlib

from qbheat_jax import api
from qbheat_jax.probe.fields import SEGMENTS
from qbheat_jax.report import detection_page, load_run, run_page, segmentation_page
from qbheat_jax.report.sample import Sample
from qbheat_jax.train import config_tables

__all__ = ["Sample", "write"]


def write(workdir, model=None, images=None):
    """Write the page of a run (see `run_page.write`), of a detector or of a segmentation. Return its path.

    Raises:
      UserError: the workdir holds none of them.
    """
    result = load_run.read_json(pathlib.Path(workdir) / "result.json")
    if isinstance(result, dict) and result.get("protocol") in SEGMENTS:
        return segmentation_page.write(workdir, result)
    if config_tables.of(api.read_config(workdir)) is config_tables.DETECT:
        return detection_page.write(workdir)
    return run_page.write(workdir, model, images)
