"""Collect the results of a comparison from its cells, and format them as JSON, Markdown and plain text."""

import datetime
import itertools
import json
import logging
import os
import platform
import statistics

import jax

import qbheat_jax
from qbheat_jax import atomic, console
from qbheat_jax import eval as eval_lib
from qbheat_jax import methods as method_lib
from qbheat_jax.compare import cells
from qbheat_jax.compare import plan as plan_lib
from qbheat_jax.errors import writing
from qbheat_jax.eval import metric_of, miou, monitors
from qbheat_jax.pretrained import NO_ENCODER
from qbheat_jax.probe.fields import SEGMENTS
from qbheat_jax.report.text import NONE, number
from qbheat_jax.train import metrics
from qbheat_jax.train.config_tables import DETECT

log = logging.getLogger("qbheat")


def gather(plan, workdir, failures):
    """Collect the results of all finished cells.

    Args:
      plan: A `plan.Plan`.
      workdir: `epath.Path` of the comparison.
      failures: {path of a cell: reason}.

    Returns:
      The dict in result.json. Missing values are None. `cells` has one entry per cell. `methods` maps each name, in the
      order of the table, to a dict with
        probes: {name: {"mean", "std" (sample), "seeds": {seed: the headline, such as top-1}, "failed": [seed]}};
        ahead_of_random: the same for the difference from the untrained encoder, seed by seed, without "failed";
        examples, epochs: length of pre-training;
        seconds, images_per_second: means over the seeds;
        gflops_per_image, and pflops of the whole pre-training;
        label_free: {monitor: {"mean", "std", "seeds"}} of the encoders that were probed;
        failed: entries of the failed cells.
      `rank_correlations` maps each probe to {monitor: {"spearman", "n": encoders}}, over all encoders of all seeds.
    """
    found = [_cell(cell, cells.result(cell, workdir), workdir, failures) for cell in plan.cells()]
    random = _probes([c for c in found if c["method"] == "random"])
    methods = {m.name: _method(m, [c for c in found if c["method"] == m.name], random) for m in plan.methods}
    return {
        "config": plan.path,
        "workdir": str(workdir),
        "command": console.command(),
        "written": datetime.datetime.now().isoformat(" ", "minutes"),
        "machine": _machine(),
        "data": _data(plan),
        "seeds": list(plan.seeds),
        "probes": {name: config.get("protocol") or config.objective for name, config in plan.probes.items()},
        "detectors": _detectors(plan),
        "headlines": {name: _headline(config) for name, config in plan.probes.items()},
        "figures": _figures_in_words(plan, found),
        "rank_correlations": _correlations(plan, methods),
        "finished": all(cell["state"] == "done" for cell in found),
        "warnings": warnings(plan),
        "methods": methods,
        "cells": found,
    }


def _detectors(plan):
    """Return {name: data source} of the detectors among the probes."""
    return {name: config.data.source for name, config in plan.probes.items() if plan_lib.table_of(config) is DETECT}


def _headline(config):
    """Return the name of the figure that a probe's results quote first."""
    if plan_lib.table_of(config) is DETECT:
        return metric_of(method_lib.of(config)).headline
    return miou.QUOTED[0] if config.protocol in SEGMENTS else "top-1"


def _dense(plan):
    """Return {name: data source} of the probes that have data of their own, the detectors last."""
    own = {n: c.data.source for n, c in plan.probes.items() if c.get("protocol") in SEGMENTS}
    return {**own, **_detectors(plan)}


def _data(plan):
    """Return the data source of the probes, which is that of pre-training by default."""
    probed = [config for name, config in plan.probes.items() if name not in _dense(plan)]
    trained = [method.config for method in plan.methods if method.config is not None]
    return (probed or trained)[0].data.source


def _figures_in_words(plan, found):
    """Return a phrase that names the metrics in the probes' columns."""
    dense = _dense(plan)
    own = {cell["split"] for cell in found if "split" in cell and cell["probe"] not in dense}
    tested = " and ".join(sorted(own)) or "test"
    parts = [f"{_headline(plan.probes[name])} of {name} on {source}" for name, source in dense.items()]
    if len(parts) < len(plan.probes):
        parts.insert(0, f"Top-1 on {tested} images of {_data(plan)}")
    return ", ".join(parts)


def warnings(plan):
    """Return the warnings to show with the table, a list of strings."""
    given = {m.name: m.examples for m in plan.methods if m.config is not None}
    if len(set(given.values())) < 2:
        return []
    words = ", ".join(f"{name} {number(count)}" for name, count in given.items())
    return [f"the methods do not see the same number of images in pre-training: {words}"]


def failed(result):
    """Return the entries of the failed cells."""
    return [cell for cell in result["cells"] if cell["state"] == "failed"]


def write(result, workdir):
    """Write WORKDIR/table.md and WORKDIR/result.json atomically. Raise UserError if the disk refuses."""
    with writing(f"--workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (("table.md", markdown(result)), ("result.json", json.dumps(result, indent=2) + "\n")):
            atomic.write(workdir / name, content)


def _cell(cell, found, workdir, failures):
    """Return the entry of one cell."""
    entry = {"method": cell.method.name, "seed": cell.seed, "probe": cell.probe or None, "path": cell.path}
    if found is None:
        if cell.path in failures:
            return {**entry, "state": "failed", "reason": failures[cell.path]}
        return {**entry, "state": "not run" if cell.encoder in failures else "waiting"}
    if cell.probe:
        quoted = eval_lib.quoted(found)
        figures = {key: found.get(key) for key in (*quoted, "n", "seconds")}
        if not cell.detects:
            figures["split"] = found.get("split", "test")
        more = {key: found[key] for key in ("chance", "constant") if key in found}
        free = {key: found[key] for key in monitors.TITLES if found.get(key) is not None}
        return {**entry, "state": "done", "headline": quoted[0], **figures, **more, **free}
    # A resumed run only reports the time since its last start, so the total is estimated from its speed.
    run, rate = found["steps_run"], found["images_per_second"]
    seconds = cell.method.examples / rate if run else None
    logged = (line.get("train/images_per_second") for line in metrics.read(workdir / cell.path))
    rates = [speed for speed in logged if speed is not None]
    return {
        **entry,
        "state": "done",
        "seconds": seconds,
        "interrupted": run < cell.method.steps,
        "images_per_second": statistics.median(rates) if rates else rate,
        "gflops_per_image": found.get("gflops_per_image"),
    }


def _method(method, found, random):
    runs = [cell for cell in found if not cell["probe"] and cell["state"] == "done"]
    gflops = next((cell["gflops_per_image"] for cell in runs), None)
    probes = _probes(found)
    return {
        "trained": method.config is not None,
        "objective": method.config.objective if method.config is not None else None,
        "encoder": method.config.encoder.name if method.config is not None else None,
        "differs": method.own,
        "examples": method.examples,
        "epochs": method.epochs,
        "probes": probes,
        "label_free": _label_free(found),
        "ahead_of_random": _ahead(probes, random) if method.config is not None else {},
        "seconds": _mean(cell["seconds"] for cell in runs),
        "images_per_second": _mean(cell["images_per_second"] for cell in runs),
        "gflops_per_image": gflops,
        "pflops": gflops and gflops * method.examples / 1e6,
        "failed": [cell for cell in found if cell["state"] == "failed"],
    }


def _probes(found):
    probes = {}
    for cell in found:
        if cell["probe"]:
            values, lost = probes.setdefault(cell["probe"], ({}, []))
            if cell["state"] == "done":
                values[str(cell["seed"])] = cell[cell["headline"]]
            elif cell["state"] != "waiting":
                lost.append(str(cell["seed"]))
    return {name: {**_spread(values), "failed": lost} for name, (values, lost) in probes.items()}


def _label_free(found):
    """Return {monitor: spread over the seeds}. All probes of an encoder have the same figures."""
    values = {name: {str(c["seed"]): c[name] for c in found if name in c} for name in monitors.TITLES}
    return {name: _spread(seeds) for name, seeds in values.items() if seeds}


# Encoders that a rank correlation is of at least.
_ENCODERS = 4


def _correlations(plan, methods):
    """Return {probe: {monitor: {"spearman", "n"}}} over the encoders that have both, {} of fewer than four."""
    found = {}
    encoders = [m for name, m in methods.items() if name not in NO_ENCODER]
    for probe, monitor in itertools.product(plan.probes, monitors.TITLES):
        pairs = []
        for m in encoders:
            free, seeds = (
                m[key].get(name, {}).get("seeds", {}) for key, name in (("label_free", monitor), ("probes", probe))
            )
            pairs += [(free[seed], seeds[seed]) for seed in seeds if seed in free]
        if len(pairs) >= _ENCODERS:
            found.setdefault(probe, {})[monitor] = {"spearman": monitors.spearman(*zip(*pairs)), "n": len(pairs)}
    return found


def _ahead(probes, random):
    """Return the differences from the untrained encoder, paired by seed to cancel the seed's effect on both."""
    ahead = {}
    for name in probes:
        ours, theirs = probes[name]["seeds"], random.get(name, {}).get("seeds", {})
        ahead[name] = _spread({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs})
    return ahead if random else {}


def _spread(values):
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "seeds": values,
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def _machine():
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "qbheat_jax": qbheat_jax.__version__,
    }


# --- As text ---------------------------------------------------------------------------------------------------------


def text(result):
    """Return the table as plain text for a terminal."""
    return _page(result, _aligned, str)


def markdown(result):
    """Return the table as Markdown, with the best trained method of each probe in bold."""
    return _page(result, _piped, "**{}**".format) + "\n"


def _page(result, table, bold):
    title = f"{result['figures']}, {_seeds_in_words(result['seeds'])}."
    parts = [title, table(_rows(result, bold))]
    ahead = _ahead_rows(result)
    if len(ahead) > 1:
        parts += ["Difference from the untrained encoder, paired by seed:", table(ahead)]
    free = _label_free_rows(result)
    if len(free) > 1:
        parts += ["Label-free monitors of the encoders, on training images:", table(free)]
    if result["rank_correlations"]:
        parts += ["Spearman's rank correlation of the monitors with the probes:", table(_correlation_rows(result))]
    parts += [f"Warning: {line}." for line in result["warnings"]]
    parts += [f"Failed: {cell['path']}: {cell['reason']}" for cell in failed(result)]
    return "\n\n".join(parts)


def _seeds_in_words(seeds):
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}"


def _rows(result, bold):
    rows = [("method", *result["probes"], "epochs", "train s", "images/s", "GFLOPs/image", "PFLOPs")]
    best = best_means(result)
    for name, method in result["methods"].items():
        scores = []
        for probe in result["probes"]:
            entry = method["probes"].get(probe)
            score = _score(entry)
            leads = method["trained"] and entry["mean"] is not None and entry["mean"] == best[probe]
            scores.append(bold(score) if leads else score)
        length = number(method["epochs"]) if method["trained"] else "-"
        costs = (number(method[key]) for key in ("seconds", "images_per_second", "gflops_per_image", "pflops"))
        rows.append((name, *scores, length, *(cost if cost != NONE else "-" for cost in costs)))
    return rows


def best_means(result):
    """Return {probe: best mean of the trained methods, or None without results}."""
    best = {}
    for probe in result["probes"]:
        means = [m["probes"][probe]["mean"] for m in result["methods"].values() if m["trained"]]
        best[probe] = max((mean for mean in means if mean is not None), default=None)
    return best


def _ahead_rows(result):
    rows = [("method", *result["probes"])]
    for name, method in result["methods"].items():
        if any(entry["seeds"] for entry in method["ahead_of_random"].values()):
            rows.append((name, *(_each(method["ahead_of_random"][probe]) for probe in result["probes"])))
    return rows


def _label_free_rows(result):
    rows = [("method", *monitors.TITLES.values())]
    for name, method in result["methods"].items():
        entries = [method["label_free"].get(key) for key in monitors.TITLES]
        if any(entries):
            rows.append((name, *(_number(entry) for entry in entries)))
    return rows


def _correlation_rows(result):
    rows = [("probe", *monitors.TITLES.values(), "encoders")]
    for probe, found in result["rank_correlations"].items():
        values = [found.get(key, {}).get("spearman") for key in monitors.TITLES]
        count = max(entry["n"] for entry in found.values())
        rows.append((probe, *("-" if value is None else f"{value:+.2f}" for value in values), str(count)))
    return rows


def _number(entry):
    if not entry or entry["mean"] is None:
        return "-"
    return number(entry["mean"]) + (f" ± {number(entry['std'])}" if entry["std"] is not None else "")


def _score(entry):
    """Return the text of one cell: "0.891 ± 0.008", "failed", or "-" without a result."""
    if entry is None:
        return "-"
    lost = len(entry["failed"])
    if entry["mean"] is None:
        return "failed" if lost else "-"
    spread = f" ± {entry['std']:.3f}" if entry["std"] is not None else ""
    return f"{entry['mean']:.3f}{spread}" + (f" ({lost} failed)" if lost else "")


def _each(entry):
    if entry["mean"] is None:
        return "-"
    if entry["std"] is None:
        return f"{entry['mean']:+.3f}"
    return f"{entry['mean']:+.3f} ± {entry['std']:.3f} ({', '.join(f'{v:+.3f}' for v in entry['seeds'].values())})"


def _aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _piped(rows):
    rows = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
