"""Tables and curves of a run's probes, beside random initialisation and the trivial baselines."""

import math

from qbheat_jax.report import charts as charts_lib
from qbheat_jax.report import load_run, text


def charts(groups, method):
    """Return one chart for each protocol and data set whose heads' curves were kept."""
    made = []
    for protocol, data in dict.fromkeys((g.protocol, g.data) for g in groups):
        here = [g for g in groups if (g.protocol, g.data) == (protocol, data)]
        ours, random = (_curves(here, name) for name in (method, load_run.BASELINES["random"]))
        if ours or random:
            chance = next((g.mean("chance") for g in here if g.values("chance")), None)
            svg = charts_lib.accuracies(ours, random, chance, f"{len(made)}", method)
            made.append({"protocol": protocol, "data": data, "svg": svg, "seeds": max(len(ours), len(random))})
    return made


def _curves(groups, features):
    curves = []
    for probe in (p for g in groups if g.features == features for p in g.probes):
        points = [(line["step"], line["probe/holdout_top1"]) for line in probe.curve if "probe/holdout_top1" in line]
        if points:
            curves.append(tuple(zip(*points)))
    return curves


def tables(groups, method):
    """Return one table for each protocol and data set: the run's method, random initialisation, baselines, chance."""
    several = len({g.data for g in groups}) > 1
    made = []
    for protocol, data in dict.fromkeys((g.protocol, g.data) for g in groups):
        here = [g for g in groups if (g.protocol, g.data) == (protocol, data)]
        random = next((g.mean("top1") for g in here if g.features == load_run.BASELINES["random"]), None)
        ours = next((g for g in here if g.features == method), None)
        best = max(g.mean("top1") for g in here)
        made.append(
            {
                "protocol": protocol,
                "data": data if several else "",
                "split": " and ".join(sorted({p.result.get("split", "test") for g in here for p in g.probes})),
                "about": text.PROTOCOLS.get(protocol, ""),
                "rows": [_row(g, random, best, method) for g in here] + _chance(here),
                "random": random,
                "ours": _row(ours, random, best, method) if ours else None,
            }
        )
    return made


def dense(groups, names):
    """Return one row for each dense probe, data set and encoder, with means over the seeds.

    names: of the figures shown, such as AP and AP50; the first ranks the encoders.
    """
    rows = []
    for group in groups:
        alike = [g.mean(names[0]) for g in groups if (g.protocol, g.data) == (group.protocol, group.data)]
        figures = {name: (group.mean(name), group.spread(name)) for name in names}
        seeds = ", ".join(dict.fromkeys(str(p.result.get("seed", text.NONE)) for p in group.probes))
        best = len(alike) > 1 and group.mean(names[0]) == max(alike)
        rows.append({"group": group, "figures": figures, "seeds": seeds, "best": best})
    return rows


def _row(group, random, best, method):
    top1, counts = group.mean("top1"), sorted({int(n) for n in group.values("n")})
    against = None if random is None or group.features == load_run.BASELINES["random"] else top1 - random
    return {
        "features": group.features,
        "ours": group.features == method or group.features.startswith(f"{method}, "),
        "top1": top1,
        "top1_spread": group.spread("top1"),
        "top5": group.mean("top5"),
        "top5_spread": group.spread("top5"),
        "against": against,
        "best": top1 == best,
        "n": ", ".join(text.number(n) for n in counts),
        "runs": len(group.probes),
        "error": math.sqrt(top1 * (1 - top1) / counts[0]) if counts and counts[0] else None,
        "seeds": ", ".join(dict.fromkeys(str(p.result.get("seed", "\u2013")) for p in group.probes)),
        "hparams": _hparams(group),
    }


def _chance(groups):
    chance = next((g.mean("chance") for g in groups if g.values("chance")), None)
    if chance is None:
        return []
    row = dict.fromkeys(("top1_spread", "top5", "top5_spread", "against", "error"))
    texts = dict.fromkeys(("n", "seeds", "hparams"), "")
    return [{**row, **texts, "features": "chance", "ours": False, "top1": chance, "best": False, "runs": 0}]


def _hparams(group):
    """Return the chosen hyper-parameters of a group of seeds as text."""
    chosen = {}
    for probe in group.probes:
        for key, value in (probe.result.get("hparams") or {}).items():
            chosen.setdefault(key.replace("_", "\u00a0"), []).append(text.setting(value))
    return "; ".join(f"{key}\u00a0{' / '.join(dict.fromkeys(values))}" for key, values in chosen.items())
