"""Results of probes as files, lines and tables."""

import json

from qbheat_jax import atomic
from qbheat_jax import config as config_lib
from qbheat_jax import eval as eval_lib
from qbheat_jax.data import palette
from qbheat_jax.errors import writing
from qbheat_jax.eval import miou
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


def pictures(workdir, masks):
    """Write WORKDIR/predictions/INDEX.png, index PNGs in the colours of `data.palette`. masks: {index: uint8 [S, S]}."""
    folder = workdir / "predictions"
    with writing(f"--workdir {workdir}"):
        for index, mask in masks.items():
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write(folder / f"{index}.png", palette.png(mask))


def line(result):
    """Return one result as one line."""
    figures = ", ".join(f"{_figure(name)} {_number(result[name])}" for name in eval_lib.quoted(result))
    return (
        f"{_protocol(result)} of {result['init']}: {figures} on {result['n']} {_split(result)} images "
        f"({result['seconds']:.0f} s)"
    )


def table(results):
    """Return results as Markdown tables, one for the accuracies and one for segmentation.

    The last row of a table is the constant prediction: the commonest class of all.
    """
    kinds = dict.fromkeys(eval_lib.quoted(r) for r in results)
    return "\n\n".join(_table(kind, [r for r in results if eval_lib.quoted(r) == kind]) for kind in kinds)


def _table(quoted, results):
    rows = [("protocol", "init", *map(_figure, quoted), "held-out", "images", "chosen", "seed")]
    for r in results:
        held_out = _number(r.get(f"holdout_{quoted[0]}"))
        figures = (*(_number(r[name]) for name in quoted), held_out, _images(r))
        rows.append((_protocol(r), r["init"], *figures, _chosen(r["hparams"]), str(r["seed"])))
    first = results[0]
    constant = first.get("constant") or {"top1": first["chance"]}
    figures = (_number(constant.get(name)) for name in quoted)
    rows.append(("-", "always the commonest class", *figures, "-", _images(first), "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows)


# Names of figures that are not their key.
_NAMES = {"top1": "top-1", "top5": "top-5", miou.QUOTED[1]: "pixel accuracy"}


def _figure(name):
    return _NAMES.get(name, name)


def _number(value):
    return "-" if value is None else f"{value:.3f}"


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
