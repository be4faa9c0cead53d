"""Results of probes as files, lines and tables."""

import json

from qbheat_jax import atomic
from qbheat_jax import config as config_lib
from qbheat_jax.errors import writing
from qbheat_jax.train import metrics


def name(config):
    """Return a probe's name for files: its protocol and, few-shot, the share of labels.

    >>> from qbheat_jax.config import resolve
    >>> from qbheat_jax.probe.fields import PROBE
    >>> name(resolve({"protocol": "tran-1", "data.fraction": 0.01}, PROBE))
    'tran-1-1pct'
    """
    share = config.data.fraction
    return config.protocol if share == 1 else f"{config.protocol}-{100 * share:g}pct"


def write(workdir, config, result, curve):
    """Write WORKDIR/config.json, metrics.jsonl (`curve`: the chosen head's lines) and, last, result.json."""
    with writing(f"--workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write(workdir / "config.json", config_lib.to_json(config))
        writer = metrics.Writer(workdir, loggers=config.loggers, config=config)
        for line in curve:
            writer.write(line["step"], {name: value for name, value in line.items() if name != "step"})
        writer.close()
        atomic.write(workdir / "result.json", json.dumps(result, indent=2) + "\n")


def line(result):
    """Return one result as one line."""
    return (
        f"{_protocol(result)} of {result['init']}: top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} on "
        f"{result['n']} {_split(result)} images ({result['seconds']:.0f} s)"
    )


def table(results):
    """Return results as a Markdown table, whose last row is the accuracy of always naming the commonest class."""
    rows = [("protocol", "init", "top-1", "top-5", "held-out", "images", "chosen", "seed")]
    for r in results:
        held_out = f"{r['holdout_top1']:.3f}" if r.get("holdout_top1") is not None else "-"
        figures = (f"{r['top1']:.3f}", f"{r['top5']:.3f}", held_out, _images(r))
        rows.append((_protocol(r), r["init"], *figures, _chosen(r["hparams"]), str(r["seed"])))
    chance = f"{results[0]['chance']:.3f}"
    rows.append(("-", "always the commonest class", chance, "-", "-", _images(results[0]), "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


def _split(result):
    """The split that was tested on: val where there is no test split."""
    return result.get("split", "test")


def _images(result):
    return str(result["n"]) if _split(result) == "test" else f"{result['n']} of {_split(result)}"


def _protocol(result):
    share = result.get("fraction", 1)
    return result["protocol"] if share == 1 else f"{result['protocol']}, {100 * share:g} % of the labels"


def _chosen(hparams):
    numbers = ("learning_rate", "weight_decay", "neighbours", "temperature")
    return ", ".join(f"{key.replace('_', ' ')} {hparams[key]:g}" for key in numbers if key in hparams)
