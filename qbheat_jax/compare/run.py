"""Run the unfinished cells of a comparison and keep its table up to date."""

import gc
import logging
import os
import shutil

import jax
from etils import epath

from qbheat_jax import pretrained
from qbheat_jax.compare import cells, table
from qbheat_jax.errors import PREEMPTED, UserError
from qbheat_jax.probe.encode import POOLED
from qbheat_jax.report import comparison_page
from qbheat_jax.tasks import detect, pretrain, probe
from qbheat_jax.train import lock

log = logging.getLogger("qbheat")


def run(plan, workdir):
    """Run the unfinished cells of a comparison.

    WORKDIR/METHOD/seed-S is an ordinary run, with its probes in probe/. Each cell rewrites result.json and table.md; each
    encoder rewrites report/index.html. If a cell fails, the others still run, and the next call retries it.

    Args:
      plan: A `plan.Plan`.
      workdir: Path of the comparison.

    Returns:
      The dict in WORKDIR/result.json, see `table.gather`.

    Raises:
      UserError: WORKDIR holds cells of another config (raised before any run), or SIGTERM stopped the comparison after
        everything was saved.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"compare takes one process, which uses all devices of its machine; {jax.process_count()} processes were started"
        )
    with lock.held(workdir):
        return _filled(plan, epath.Path(workdir))


def _filled(plan, workdir):
    failures = {}
    cells.check_workdir(plan.cells(), workdir)
    for line in table.warnings(plan):
        log.warning("%s", line)
    result = _written(plan, workdir, failures)
    _page(result, workdir)
    for encoder in plan.encoders():
        todo = [cell for cell in encoder if cells.result(cell, workdir) is None]
        if not todo:
            continue
        store = probe.FeatureCache(workdir / todo[0].encoder / "probe" / "features")
        for cell in sorted(todo, key=_order):
            if todo[0].probe == "" and todo[0].path in failures:
                break  # without its pre-training there is no encoder to probe
            reason = _run(cell, workdir, store)
            if reason:
                failures[cell.path] = reason
                log.error("%s failed: %s", cell.path, reason)
            result = _written(plan, workdir, failures)
        # Cached features of many encoders would fill the disk, and their compiled programs the memory.
        shutil.rmtree(workdir / todo[0].encoder / "probe" / "features", ignore_errors=True)
        del store
        jax.clear_caches()
        gc.collect()
        _page(result, workdir)
    return result


def _run(cell, workdir, store):
    """Run one cell. Return None, or the reason for its failure in one line."""
    folder = workdir / cell.path
    log.info("%s", cell.path)
    try:
        if not cell.probe:
            pretrain.run(cell.config, folder)
            return None
        init = str(workdir / cell.encoder) if cell.method.config is not None else cell.method.name
        if cell.detects:
            found = detect.run(pretrained.with_fields(cell.config, {"init": init}, cell.table), folder)
            log.info("%s", detect.line(found))
        else:
            log.info("%s", probe.line(probe.run(cell.config, folder, init, store)))
    except Exception as error:  # the other cells do not depend on this one
        if isinstance(error, UserError) and error.exit_code == PREEMPTED:
            raise  # SIGTERM stops the whole comparison
        if os.environ.get("QBHEAT_DEBUG"):
            log.exception("traceback, shown because QBHEAT_DEBUG is set")
        first = (str(error).strip().splitlines() or [""])[0]
        return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
    return None


def _written(plan, workdir, failures):
    result = table.gather(plan, workdir, failures)
    table.write(result, workdir)
    return result


def _page(result, workdir):
    try:
        comparison_page.write(result, workdir)
    except UserError as error:  # matplotlib and jinja2 are an optional extra; the table does not need them
        log.warning("the page was not written: %s", error)


def _order(cell):
    """Return the sort key: pre-training, probes of cells, then probes of pooled features, which reuse the cells."""
    return bool(cell.probe) + (bool(cell.probe) and cell.config.get("protocol") in POOLED)
