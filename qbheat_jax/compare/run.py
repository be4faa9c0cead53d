"""Runs the cells of a comparison that are not there yet, and keeps its table up to date."""

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
    """Runs what is not finished -> the result, as WORKDIR/result.json has it (see `table.gather`).

    WORKDIR/METHOD/seed-S is an ordinary run, with its probes below it. After every cell result.json and table.md are
    written anew, after every encoder report/index.html. A cell that fails is noted and the others go on; the next call
    tries it again. Raises UserError where WORKDIR holds cells of another config, before anything is run, and where it is
    stopped by SIGTERM, with all saved.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"a comparison runs in one process, on all devices of one machine; {jax.process_count()} were started"
        )
    with lock.held(workdir):
        return _filled(plan, epath.Path(workdir))


def _filled(plan, workdir):
    failures = {}
    cells.claim(plan.cells(), workdir)
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
                break  # there is no encoder to probe
            reason = _run(cell, workdir, store)
            if reason:
                failures[cell.path] = reason
                log.error("%s failed: %s", cell.path, reason)
            result = _written(plan, workdir, failures)
        # Features can be made again, and those of many encoders would fill the disk; so would their programs the memory.
        shutil.rmtree(workdir / todo[0].encoder / "probe" / "features", ignore_errors=True)
        del store
        jax.clear_caches()
        gc.collect()
        _page(result, workdir)
    return result


def _run(cell, workdir, store):
    """Runs one cell -> why it failed, in one line, or None."""
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
    except Exception as error:  # whatever it is, the other cells can do without this one
        if isinstance(error, UserError) and error.exit_code == PREEMPTED:
            raise  # it is the comparison that was to stop
        if os.environ.get("QBHEAT_DEBUG"):
            log.exception("traceback, because QBHEAT_DEBUG is set")
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
    except UserError as error:  # matplotlib and jinja2 are an extra; the figures are there without them
        log.warning("there is no page: %s", error)


def _order(cell):
    """The pre-training, then the probes of cells: their means then need not be encoded again."""
    return bool(cell.probe) + (bool(cell.probe) and cell.config.get("protocol") in POOLED)
