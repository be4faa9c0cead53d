"""Puts the page together: what `gather` read and what the model makes of some images, through the template."""

import importlib.metadata
import importlib.resources
import math
import pathlib
import shlex
import statistics

import numpy as np

from qbheat_jax import config as config_lib
from qbheat_jax import heat, quarters, trees
from qbheat_jax.errors import UserError
from qbheat_jax.report import figures, gather, sample, tiles, words

PACKAGES = (
    "qbheat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "tensorflow-cpu", "numpy", "pillow"
)  # fmt: skip


def write(workdir, model=None, images=None):
    """Writes WORKDIR/report/index.html -> its path.

    model: as `qbheat_jax.load(workdir)` gives it, which is what is used by default. images: a `sample.Sample` to show
    instead of images of the run's own data. Raises UserError where the workdir holds no run.
    """
    run = gather.read(workdir)
    template = _template()
    if model is None:
        if not (run.path / "checkpoints").is_dir():
            raise UserError(f"--workdir {workdir} holds no run that can be shown: there is no checkpoint in it yet")
        import qbheat_jax

        model = qbheat_jax.load(run.path)
    text = template.render(_context(run, model, images))
    path = pathlib.Path(run.path) / "report" / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _template():
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"a report needs jinja2 ({error}): pip install 'qbheat_jax[report]'") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        number=words.number, percent=words.percent, points=words.points, duration=words.duration, safe_svg=jinja2.filters.do_mark_safe
    )
    text = importlib.resources.files("qbheat_jax.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


def _context(run, model, images):
    """Everything that the template names."""
    shown, no_images = images, ""
    if shown is None:
        try:
            shown = sample.draw(run.config)
        except UserError as error:  # The data need not be where the page is made.
            no_images = str(error)
    if shown is not None and not len(shown.images):
        shown, no_images = None, "none of its images could be read"
    groups, encoder = run.groups(), model.variables["params"].get("encoder")
    blocks = pictures(model, shown, run.config) if shown is not None else []
    validation = run.config.data.eval_split or "val"
    context = {
        "run": run,
        "config": run.config,
        "step": model.step,
        "story": words.story(run.config, model.step, shown.sizes if shown else {}, trees.count(encoder) if encoder else None),
        "sample": shown,
        "shown": sample.SHOWN,
        "no_images": no_images,
        "blocks": blocks,
        "losses": loss_chart(run, validation),
        "accuracies": accuracy_charts(groups),
        "tables": probe_tables(groups),
        "operator": operator(model.variables["params"].get("decoder", {}).get("heat"), run.config),
        "timing": timing(run),
        "commands": commands(run),
        "versions": versions(),
        "fields": fields(run.config),
    }
    return {**context, "headlines": headlines(run, context["tables"], validation, blocks)}


def pictures(model, shown, config):
    """For each placement of the run: tiles of the first images, and mean errors over all of them."""
    blocks = []
    for quarter in quarters.PLACEMENT_SETS[config.quarter.placements]:
        made = tiles.reconstruct(model, shown.images, quarter)
        filled = tiles.mean_fill(shown.images, quarter)
        error, trivial = (tiles.errors(p, shown.images, quarter) for p in (made, filled))
        seen = tiles.visible(shown.images, quarter)
        blocks.append(
            {
                "name": words.placement(quarter),
                "box": tiles.box(quarter),
                "error": error.mean(),
                "trivial": trivial.mean(),
                "better": int((error < trivial).sum()),
                "cards": [
                    {
                        "name": shown.names[i],
                        "original": tiles.data_uri(shown.images[i]),
                        "visible": tiles.data_uri(seen[i]),
                        "made": tiles.data_uri(made[i]),
                        "filled": tiles.data_uri(filled[i]),
                        "error": error[i],
                        "trivial": trivial[i],
                    }
                    for i in range(min(sample.SHOWN, len(shown.images)))
                ],
            }
        )
    return blocks


def loss_chart(run, validation):
    """Chart and words on the loss, or None where nothing was logged."""
    train, val = run.series("train/loss"), run.series(f"{validation}/loss")
    if not train[0] and not val[0]:
        return None
    variance = run.series("train/variance")
    rate = run.series("train/learning_rate")
    return {
        "svg": figures.losses(train, val, variance, rate),
        "train": run.last("train/loss"),
        "val": run.last(f"{validation}/loss"),
        "variance": run.last(f"{validation}/variance") if val[0] else run.last("train/variance"),
        "rate": bool(rate[0]),
    }


def accuracy_charts(groups):
    """One chart a protocol and data set, where the heads' curves were kept."""
    charts = []
    for protocol, data in dict.fromkeys((g.protocol, g.data) for g in groups):
        here = [g for g in groups if (g.protocol, g.data) == (protocol, data)]
        ours, random = (_curves(here, name) for name in (gather.OURS, gather.BASELINES["random"]))
        if ours or random:
            chance = next((g.mean("chance") for g in here if g.values("chance")), None)
            svg = figures.accuracies(ours, random, chance, f"{len(charts)}")
            charts.append({"protocol": protocol, "data": data, "svg": svg, "seeds": max(len(ours), len(random))})
    return charts


def _curves(groups, features):
    curves = []
    for probe in (p for g in groups if g.features == features for p in g.probes):
        points = [(line["step"], line["probe/holdout_top1"]) for line in probe.curve if "probe/holdout_top1" in line]
        if points:
            curves.append(tuple(zip(*points)))
    return curves


def probe_tables(groups):
    """One block of rows a protocol and data set: QB-Heat, random initialisation, the trivial baselines, chance."""
    several = len({g.data for g in groups}) > 1
    tables = []
    for protocol, data in dict.fromkeys((g.protocol, g.data) for g in groups):
        here = [g for g in groups if (g.protocol, g.data) == (protocol, data)]
        random = next((g.mean("top1") for g in here if g.features == gather.BASELINES["random"]), None)
        ours = next((g for g in here if g.features == gather.OURS), None)
        best = max(g.mean("top1") for g in here)
        tables.append(
            {
                "protocol": protocol,
                "data": data if several else "",
                "about": words.PROTOCOLS.get(protocol, ""),
                "rows": [_row(g, random, best) for g in here] + _chance(here),
                "random": random,
                "ours": _row(ours, random, best) if ours else None,
            }
        )
    return tables


def _row(group, random, best):
    top1, counts = group.mean("top1"), sorted({int(n) for n in group.values("n")})
    against = None if random is None or group.features == gather.BASELINES["random"] else top1 - random
    return {
        "features": group.features,
        "ours": group.features.startswith(gather.OURS),
        "top1": top1,
        "top1_spread": group.spread("top1"),
        "top5": group.mean("top5"),
        "top5_spread": group.spread("top5"),
        "against": against,
        "best": top1 == best,
        "n": ", ".join(words.number(n) for n in counts),
        "runs": len(group.probes),
        "error": math.sqrt(top1 * (1 - top1) / counts[0]) if counts and counts[0] else None,
        "seeds": ", ".join(dict.fromkeys(str(p.result.get("seed", "\u2013")) for p in group.probes)),
        "hparams": _hparams(group),
    }


def _chance(groups):
    chance = next((g.mean("chance") for g in groups if g.values("chance")), None)
    if chance is None:
        return []
    empty = gather.Group("", "", "chance", ())
    row = dict.fromkeys(("top1_spread", "top5", "top5_spread", "against", "error"))
    return [{**row, "features": empty.features, "ours": False, "top1": chance, "best": False, "n": "", "runs": 0, "seeds": "", "hparams": ""}]


def _hparams(group):
    """The chosen hyper-parameters, all values of a group of seeds together."""
    chosen = {}
    for probe in group.probes:
        for key, value in (probe.result.get("hparams") or {}).items():
            chosen.setdefault(key.replace("_", " "), []).append(words.setting(value))
    return "; ".join(f"{key} {' / '.join(dict.fromkeys(values))}" for key, values in chosen.items())


def operator(params, config):
    """What A and B learnt, or None where the model has no heat operator."""
    if not params:
        return None
    choice = heat.Heat(**config.heat.to_dict())
    facts = heat.describe(params, choice)
    spectra = {name: facts[f"spectrum/{name}"] for name in choice.names}
    width = len(next(iter(spectra.values())))
    rows = [
        {
            "name": ("A" if name[0] == "x" else "B") + name[1].replace("-", words.MINUS),
            "way": {"x+": "to the right", "x-": "to the left", "y+": "down", "y-": "up"}[name],
            "norm": float(facts[f"norm/{name}"]),
            "relative": float(facts[f"norm/{name}"]) / math.sqrt(width),
            "radius": float(np.abs(values).max()),
        }
        for name, values in spectra.items()
    ]
    correlations = {key[2:].replace("-", words.MINUS): value for key, value in facts.items() if key.startswith("S/")}
    return {
        "svg": figures.spectra(spectra, choice.propagator == "offset"),
        "offset": choice.propagator == "offset",
        "width": width,
        "rows": rows,
        "tied": choice.directions == "tied",
        "commutators": {
            key.split("/")[1].replace("-", words.MINUS): value for key, value in facts.items() if key.startswith("commutator/")
        },
        "correlations": {
            sign: {"size": float(np.linalg.norm(s)) / math.sqrt(width), "diagonal": float(np.trace(s)) / width}
            for sign, s in correlations.items()
        },
    }


def timing(run):
    """[(what, how long)], only what the files tell."""
    rate = run.summary.get("images_per_second")
    logged = run.series("train/images_per_second", 2)[1]
    waits = run.series("train/data_wait", 2)[1]
    rows = [
        ("Pre-training, from start to last checkpoint", words.duration(run.summary["seconds"])) if "seconds" in run.summary else None,
        ("Images per second, start-up included", words.number(rate)) if rate else None,
        ("Images per second, median of the log lines", words.number(statistics.median(logged))) if logged else None,
        ("Share of time spent waiting for data, median", words.percent(statistics.median(waits))) if waits else None,
        ("Image files skipped as unreadable", words.number(run.summary["skipped_files"])) if "skipped_files" in run.summary else None,
    ]
    probes = [
        (f"Probe {p.protocol}, {p.features}, seed {p.result.get('seed', words.number(None))}", words.duration(p.result["seconds"]))
        for g in run.groups()
        for p in g.probes
        if isinstance(p.result.get("seconds"), (int, float))
    ]
    return [row for row in rows if row] + probes


def commands(run):
    """The commands that repeat the run, in order."""
    recorded = [run.summary.get("command"), *(p.result.get("command") for g in run.groups() for p in g.probes)]
    report = shlex.join(["qbheat", "report", "--workdir", run.shown])
    return [*dict.fromkeys(gather.command(text, run) for text in recorded if text), report]


def versions():
    """[(package, version)] of what is installed where the page is made."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fields(config):
    """[(key, value, whether it differs from the default, what it means)] of the whole config."""
    rows = []
    for key, value in config_lib.flatten(config).items():
        default = config_lib.PRETRAIN[key].default if key in config_lib.PRETRAIN else None
        changed = words.setting(value) != words.setting(default)
        rows.append((key, words.setting(value), changed, words.document(key, config_lib.PRETRAIN)))
    return rows


def headlines(run, tables, validation, blocks):
    """The few numbers at the top: [(value, what it is, what to compare it with)]."""
    cards = []
    for table in tables:
        ours = table["ours"]
        if ours:
            data = f" on {table['data']}" if table["data"] else ""
            compared = f"{words.points(ours['against'])} points against random initialisation" if ours["against"] is not None else ""
            cards.append((words.percent(ours["top1"], ours["top1_spread"]), f"top-1 accuracy, {table['protocol']}{data}", compared))
    loss, variance = run.last(f"{validation}/loss"), run.last(f"{validation}/variance")
    if loss is not None and variance:
        explained = words.percent(1 - loss / variance)
        cards.append((explained, "of the hidden pixels\u2019 variance explained", f"loss {loss:.3f}, predicting the mean {variance:.3f}"))
    elif blocks:
        error, trivial = (statistics.fmean(b[key] for b in blocks) for key in ("error", "trivial"))
        cards.append((f"{error:.3f}", "mean squared error on hidden pixels", f"filling in the mean colour: {trivial:.3f}"))
    if run.summary.get("seconds"):
        rate = run.summary.get("images_per_second")
        cards.append((words.duration(run.summary["seconds"]), "to pre-train", f"{words.number(rate)} images per second" if rate else ""))
    return cards
