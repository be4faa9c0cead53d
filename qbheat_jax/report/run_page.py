"""The page of a run: figures of its files and reconstructions by its model, as one HTML file."""

import pathlib
import statistics

from qbheat_jax import atomic, methods, pytree
from qbheat_jax.errors import UserError, writing
from qbheat_jax.eval import miou
from qbheat_jax.ops import quarters
from qbheat_jax.report import (
    analysis_page,
    charts,
    environment,
    feature_map,
    load_run,
    operator_text,
    probes,
    sample,
    tiles,
)
from qbheat_jax.report import text as text_lib
from qbheat_jax.report.template import template

# Images on the sheet for slides and READMEs.
SHEET = 10


def write(workdir, model=None, images=None):
    """Write WORKDIR/report/index.html and reconstructions.png beside it. Return the page's path.

    Args:
      workdir: of a run.
      model: api.Model; by default `qbheat_jax.load(workdir)`.
      images: `sample.Sample` to show instead of images of the run's own data.

    Raises:
      UserError: the workdir holds no run.
    """
    run = load_run.read(workdir)
    page = template("page.html.j2")
    if model is None:
        if not (run.path / "checkpoints").is_dir():
            raise UserError(f"--workdir {workdir} holds no run that can be shown: there is no checkpoint in it yet")
        import qbheat_jax

        model = qbheat_jax.load(run.path)
    context = _context(run, model, images)
    text = page.render(context)
    path = pathlib.Path(run.path) / "report" / "index.html"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, text)
        rows = _sheet_rows(context)
        if rows:
            tiles.sheet(rows).save(path.with_name("reconstructions.png"))
    return path


def _context(run, model, images):
    """Return the variables of the template."""
    shown, no_images = images, ""
    if shown is None:
        try:
            shown = sample.draw(run.config)
        except UserError as error:  # the page may be written on a machine without the data
            no_images = str(error)
    if shown is not None and not len(shown.images):
        shown, no_images = None, "none of its images could be read"
    groups, params, sizes = run.groups(), model.variables["params"], shown.sizes if shown else {}
    encoder = pytree.count(params["encoder"]) if params.get("encoder") else None
    clips = model.encoder.takes_clips
    reconstructs = "" if clips else methods.of(run.config).reconstructs
    if shown is not None and not reconstructs:
        no_images = "clips are not shown" if clips else f"{run.method} does not reconstruct images"
    blocks = pictures(model, shown, run.config) if shown is not None and reconstructs == "quarters" else []
    decoded = whole_pictures(model, shown) if shown is not None and reconstructs == "images" else None
    validation = run.config.data.eval_split or "val"
    features, no_features = _feature_map(run.config, model) if images is None else (None, "")
    context = {
        "run": run,
        "config": run.config,
        "reconstructs": reconstructs,
        "step": model.step,
        "story": methods.of(run.config).STORY,
        "facts": text_lib.facts(run.config, model.step, sizes.get(run.config.data.split), encoder),
        "sample": shown,
        "no_images": no_images,
        "blocks": blocks,
        "decoded": decoded,
        "first": [(block, block["cards"][i % len(block["cards"])]) for i, block in enumerate(blocks[:3])],
        "losses": loss_chart(run, validation),
        "spread": spread_chart(run),
        "monitors": monitor_charts(run),
        "accuracies": probes.charts(groups, run.method),
        "tables": probes.tables(groups, run.method),
        "segmentations": probes.dense(run.groups("mIoU"), miou.QUOTED),
        "detections": probes.dense(run.groups("AP"), ("AP", "AP50", "AP75")),
        "features": features,
        "no_features": no_features,
        "operator": operator_text.describe(model.objective.operator(params)),
        "analysis": analysis_page.read(run.path / analysis_page.FOLDER),
        "timing": environment.timing(run),
        "commands": environment.commands(run),
        "versions": environment.versions(),
        "fields": environment.fields(run.config),
    }
    return {**context, "headlines": headlines(run, context["tables"], validation, blocks, decoded)}


def _sheet_rows(context):
    """Return the rows of the sheet: (visible block, reconstruction, original), or (reconstruction, original)."""
    if context["blocks"]:
        made = {block["quarter"]: block["made"] for block in context["blocks"]}
        return tiles.triples(context["sample"].images[:SHEET], made)
    return list(zip(context["decoded"]["made"], context["sample"].images[:SHEET])) if context["decoded"] else []


def pictures(model, shown, config):
    """Return for each placement of the run the tiles of the first images and the mean errors over all images."""
    blocks, placements = [], quarters.PLACEMENT_SETS[config.quarter.placements]
    for quarter in placements:
        made = tiles.reconstruct(model, shown.images, quarter)
        decoded = tiles.reconstruct(model, shown.images, quarter, blend=False)
        settled, filled = tiles.settled(shown.images, quarter), tiles.mean_fill(shown.images, quarter)
        error, as_decoded, trivial, mean = (
            tiles.errors(p, shown.images, quarter, model.objective.pixels.std) for p in (made, decoded, settled, filled)
        )
        seen = tiles.visible(shown.images, quarter)
        blocks.append(
            {
                "quarter": quarter,
                "made": made,
                "name": text_lib.placement(quarter),
                "box": tiles.box(quarter),
                "error": error.mean(),
                "decoded": as_decoded.mean(),
                "trivial": trivial.mean(),
                "mean": mean.mean(),
                "better": int((error < trivial).sum()),
                "cards": [
                    {
                        "name": shown.names[i],
                        "original": tiles.data_uri(shown.images[i]),
                        "visible": tiles.data_uri(seen[i]),
                        "made": tiles.data_uri(made[i]),
                        "settled": tiles.data_uri(settled[i]),
                        "error": error[i],
                        "trivial": trivial[i],
                    }
                    for i in range(min(sample.count(len(placements)), len(shown.images)))
                ],
            }
        )
    return blocks


def whole_pictures(model, shown):
    """Return the reconstructions of whole images, the tiles of the first ones, and the mean PSNR over all, in dB."""
    made, flat = tiles.whole(model, shown.images), tiles.mean_colour(shown.images)
    psnr, psnr_colour = tiles.psnr(made, shown.images), tiles.psnr(flat, shown.images)
    return {
        "made": made,
        "psnr": psnr.mean(),
        "psnr_colour": psnr_colour.mean(),
        "cards": [
            {
                "name": shown.names[i],
                "original": tiles.data_uri(shown.images[i]),
                "made": tiles.data_uri(made[i]),
                "psnr": psnr[i],
                "psnr_colour": psnr_colour[i],
            }
            for i in range(min(sample.count(1), len(shown.images)))
        ],
    }


def loss_chart(run, validation):
    """Return the chart and figures of the loss, or None where nothing was logged."""
    train, val = run.series("train/loss"), run.series(f"{validation}/loss")
    if not train[0] and not val[0]:
        return None
    variance = run.series("train/variance")
    rate = run.series("train/learning_rate")
    return {
        "svg": charts.losses(train, val, variance, rate),
        "train": run.last("train/loss"),
        "val": run.last(f"{validation}/loss"),
        "variance": run.last(f"{validation}/variance") if val[0] else run.last("train/variance"),
        "rate": bool(rate[0]),
    }


def spread_chart(run):
    """Return the chart and last figures of how far features are spread, or None where they were not logged."""
    std, ratio = run.series("train/feature_std"), run.series("train/participation_ratio")
    if not std[0]:
        return None
    return {"svg": charts.spread(std, ratio), "std": std[1][-1], "ratio": ratio[1][-1]}


def monitor_charts(run):
    """Return [(title, svg, last values in words)] of the monitors and online probes that were logged."""
    kinds = (
        ("Effective ranks", "effective rank", {"RankMe": "rankme", "LiDAR": "lidar"}, 1.0, "{:.1f}"),
        ("Decay of the spectrum", "exponent", {"\u03b1-ReQ": "alpha_req"}, 1.0, "{:.2f}"),
        ("Online probes", "top-1, %", {"k-NN": "knn", "linear": "lin"}, 100.0, "{:.1f}\u202f%"),
    )
    made = []
    for title, label, names, scale, form in kinds:
        series = {name: run.series(f"online/{key}") for name, key in names.items()}
        series = {name: (steps, [scale * v for v in values]) for name, (steps, values) in series.items() if steps}
        if series:
            last = ", ".join(f"{name} {form.format(values[-1])}" for name, (_, values) in series.items())
            made.append((title, charts.by_step(series, f"monitor-{len(made)}", label), last))
    return made


def _feature_map(config, model):
    """Return (`feature_map.draw` or None, the reason why there is none)."""
    try:
        return (None if model.encoder.takes_clips else feature_map.draw(config, model)), ""
    except UserError as error:
        return None, str(error)


def headlines(run, tables, validation, blocks, decoded):
    """Return the figures at the top of the page, [(value, what it is, what it compares with)]."""
    cards = []
    for table in tables:
        ours = table["ours"]
        if ours:
            what = f"top-1 accuracy, {table['protocol']}" + (f" on {table['data']}" if table["data"] else "")
            points = text_lib.points(ours["against"])
            compared = "" if ours["against"] is None else f"{points} points against random initialisation"
            cards.append((text_lib.percent(ours["top1"], ours["top1_spread"]), what, compared))
    if decoded:
        compared = f"mean colour of each image: {decoded['psnr_colour']:.1f} dB"
        cards.append((f"{decoded['psnr']:.1f} dB", "PSNR of the reconstructions", compared))
    loss, variance = run.last(f"{validation}/loss"), run.last(f"{validation}/variance")
    if loss is not None and variance:
        compared = f"loss {loss:.3f}, predicting the mean {variance:.3f}"
        cards.append((text_lib.percent(1 - loss / variance), "of the targets\u2019 variance explained", compared))
    elif blocks:
        error, trivial = (statistics.fmean(b[key] for b in blocks) for key in ("error", "trivial"))
        compared = f"the heat equation on pixels: {trivial:.3f}"
        cards.append((f"{error:.3f}", "mean squared error on hidden pixels", compared))
    if run.summary.get("seconds"):
        rate = run.summary.get("images_per_second")
        compared = f"{text_lib.number(rate)} images per second" if rate else ""
        cards.append((text_lib.duration(run.summary["seconds"]), "to pre-train", compared))
    return cards
