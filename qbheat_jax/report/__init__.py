"""One self-contained HTML page about a run: pictures, curves, probes, what A and B learnt, how to repeat it."""

from qbheat_jax import api
from qbheat_jax.report import detection_page, run_page
from qbheat_jax.report.sample import Sample
from qbheat_jax.train import config_tables

__all__ = ["Sample", "write"]


def write(workdir, model=None, images=None):
    """Write the page of a run (see `run_page.write`) or of a detector. Return its path.

    Raises:
      UserError: the workdir holds neither.
    """
    if config_tables.of(api.read_config(workdir)) is config_tables.DETECT:
        return detection_page.write(workdir)
    return run_page.write(workdir, model, images)
