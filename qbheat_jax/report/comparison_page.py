"""The page of a comparison: write one self-contained HTML file from the result of `qbheat compare`."""

from qbheat_jax import methods
from qbheat_jax.eval import monitors
from qbheat_jax.report import charts, environment, load_run, text
from qbheat_jax.report.template import save, template


def write(result, workdir):
    """Write WORKDIR/report/index.html and return its path. Raise UserError where matplotlib or jinja2 is missing."""
    return save(workdir / "report" / "index.html", template("comparison.html.j2").render(context(result)))


def context(result):
    """Return the variables of the template."""
    best = {probe: _best(result, probe) for probe in result["probes"]}
    return {
        "result": result,
        "trained": {name: m for name, m in result["methods"].items() if m["trained"]},
        "encoders": list(dict.fromkeys(m["encoder"] for m in result["methods"].values() if m["encoder"])),
        "lengths": sorted({(m["examples"], m["epochs"]) for m in result["methods"].values() if m["trained"]}),
        "labels": {name: _label(name) for name in result["methods"]},
        "best": best,
        "titles": monitors.TITLES,
        "monitors": {name: m for name, m in result["methods"].items() if m["label_free"]},
        "headlines": [_headline(result, probe, name) for probe, name in best.items() if name],
        "charts": [_charts(result, probe, str(i)) for i, probe in enumerate(result["probes"]) if _drawn(result, probe)],
        "about": {probe: text.PROTOCOLS.get(protocol, "") for probe, protocol in result["probes"].items()},
        "done": sum(cell["state"] == "done" for cell in result["cells"]),
        "failed": [cell for cell in result["cells"] if cell["state"] == "failed"],
        "interrupted": any(cell.get("interrupted") for cell in result["cells"]),
        "ahead": any(e["seeds"] for m in result["methods"].values() for e in m["ahead_of_random"].values()),
        "versions": environment.versions(),
    }


def _label(name):
    return load_run.BASELINES.get(name, name)


def _mean(result, name, probe):
    return result["methods"][name]["probes"].get(probe, {}).get("mean")


def _ranked(result, probe):
    """Return the names of the trained methods that have a figure, the best first."""
    names = [n for n, m in result["methods"].items() if m["trained"] and _mean(result, n, probe) is not None]
    return sorted(names, key=lambda name: -_mean(result, name, probe))


def _best(result, probe):
    return next(iter(_ranked(result, probe)), None)


def _headline(result, probe, name):
    """Return the card of a probe's best method: (figure, what it is, what it compares with)."""
    entry, compared = result["methods"][name]["probes"][probe], []
    ahead = result["methods"][name]["ahead_of_random"].get(probe, {}).get("mean")
    if ahead is not None:
        compared.append(f"{text.points(ahead)} points against the untrained encoder")
    if second := _ranked(result, probe)[1:2]:
        gap = entry["mean"] - _mean(result, second[0], probe)
        compared.append(f"{text.points(gap)} points against {second[0]}")
    what = f"{_figure(result, probe)} under {probe}: {name}"
    return text.percent(entry["mean"], entry["std"]), what, "; ".join(compared)


def _figure(result, probe):
    return result["headlines"][probe]


def _kind(method):
    if not method["trained"]:
        return "baseline"
    return "ours" if method["objective"] == methods.OURS else "other"


def _drawn(result, probe):
    return any(m["probes"].get(probe, {}).get("seeds") for m in result["methods"].values())


def _charts(result, probe, number):
    """Return the SVGs of one probe: all seeds, and the means against the cost of pre-training."""
    rows = [
        (_label(name), _kind(m), list(m["probes"][probe]["seeds"].values()))
        for name, m in result["methods"].items()
        if m["encoder"] or name == "random"  # others lie so far below that the seeds would not show
    ]
    costs = {}
    for key, label in (("seconds", "seconds of pre-training"), ("pflops", "10\u00b9\u2075 operations of pre-training")):
        points = [
            (name, _kind(m), m[key], m["probes"][probe]["mean"], m["probes"][probe]["std"])
            for name, m in result["methods"].items()
            if m[key] and m["probes"][probe]["mean"] is not None
        ]
        if points:
            costs[key] = charts.against(points, label, f"{key}-{number}", _figure(result, probe))
    return {"probe": probe, "dots": charts.dots(rows, f"dots-{number}", _figure(result, probe)), "costs": costs}
