"""Times, commands, versions and config fields of a run."""

import importlib.metadata
import shlex
import statistics

from qbheat_jax import config as config_lib
from qbheat_jax.report import load_run
from qbheat_jax.report import text as text_lib
from qbheat_jax.train.config_tables import PRETRAIN

PACKAGES = "qbheat_jax jax jaxlib flax optax orbax-checkpoint tensorflow tensorflow-cpu numpy pillow".split()


def timing(run):
    """Return the times recorded in the run's files, [(what, how long)]."""
    summary, rows = run.summary, []
    if "seconds" in summary:
        rows.append(("Pre-training, from start to last checkpoint", text_lib.duration(summary["seconds"])))
    if "images_per_second" in summary:
        rows.append(("Images per second, start-up included", text_lib.number(summary["images_per_second"])))
    # The first line includes compilation.
    logged, waits = run.series("train/images_per_second", 2)[1], run.series("train/data_wait", 2)[1]
    if logged:
        rows.append(("Images per second, median of the log lines", text_lib.number(statistics.median(logged))))
    if waits:
        rows.append(("Share of time spent waiting for data, median", text_lib.percent(statistics.median(waits))))
    if "skipped_files" in summary:
        rows.append(("Image files skipped as unreadable", text_lib.number(summary["skipped_files"])))
    for group in run.groups():
        seconds, count = group.mean("seconds"), len(group.values("seconds"))
        if count:
            data = f" on {group.data}" if len({g.data for g in run.groups()}) > 1 else ""
            many = f", mean of {count}" if count > 1 else ""
            rows.append((f"Probe {group.protocol}{data}, {group.features}{many}", text_lib.duration(seconds)))
    for what, figure in (("Segmentation", "mIoU"), ("Detector", "AP")):
        for group in run.groups(figure):
            label = f"{what} {group.protocol} on {group.data}, {group.features}"
            rows.append((label, text_lib.duration(group.mean("seconds"))))
    return rows


def commands(run):
    """Return the commands that repeat the run, in order."""
    groups = [*run.groups(), *run.groups("mIoU"), *run.groups("AP")]
    recorded = [run.summary.get("command"), *(p.result.get("command") for g in groups for p in g.probes)]
    report = shlex.join(["qbheat", "report", "--workdir", run.shown])
    return [*dict.fromkeys(load_run.typed(text, run.path) for text in recorded if text), report]


def versions(packages=PACKAGES):
    """Return [(package, version)] of the installed packages."""
    found = []
    for name in packages:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fields(config, table=PRETRAIN):
    """Return [(key, value, whether it differs from the default, meaning)] of the whole config."""
    rows = []
    for key, value in config_lib.flatten(config).items():
        default = table[key].default if key in table else None
        changed = text_lib.setting(value) != text_lib.setting(default)
        rows.append((key, text_lib.setting(value), changed, text_lib.document(key, table)))
    return rows
