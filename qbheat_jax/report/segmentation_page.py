"""The page of a segmentation: write one self-contained HTML file from the workdir of `qbheat probe`, protocol seg-*."""

import pathlib

import numpy as np

from qbheat_jax import config as config_lib
from qbheat_jax import data
from qbheat_jax.data import decode, palette
from qbheat_jax.data.specs.masks import IGNORED
from qbheat_jax.errors import UserError
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.report import environment, load_run, text, tiles
from qbheat_jax.report.template import save, template

# Longest side at which a page keeps an image.
LONGEST = 320


def write(workdir, result):
    """Write WORKDIR/report/index.html and return its path. result: of WORKDIR/result.json."""
    workdir = pathlib.Path(workdir)
    return save(workdir / "report" / "index.html", template("segmentation.html.j2").render(_context(workdir, result)))


def _context(workdir, result):
    """Return the variables of the template."""
    try:
        config = config_lib.from_json((workdir / "config.json").read_text(), PROBE)
    except OSError as error:
        raise UserError(f"--workdir {workdir} holds a result without its config.json: {error}") from error
    names, cards, no_images = [], [], ""
    try:
        source = data.open_source(result["data"], tfds_dir=config.data.tfds_dir)
        names = source.mask_names or []
        cards = _cards(source, result, workdir / "predictions")
    except UserError as error:  # the page may be written on a machine without the data
        no_images = str(error)
    colours = ["#" + bytes(colour).hex() for colour in palette.colours()]
    numbers = {name: k for k, name in enumerate(names)}
    shown = sorted({k for card in cards for k in card["classes"]})
    constant = result["constant"]
    return {
        "result": result,
        "encoder": load_run.BASELINES.get(result["init"], f"the encoder of {load_run.shown(result['init'])}"),
        "about": text.PROTOCOLS[result["protocol"]],
        "chosen": ", ".join(f"{key.replace('_', ' ')} {text.setting(v)}" for key, v in result["hparams"].items()),
        "headlines": [
            (text.percent(result["mIoU"]), "mean IoU", text.percent(constant["mIoU"])),
            (text.percent(result["pixel_accuracy"]), "pixel accuracy", text.percent(constant["pixel_accuracy"])),
        ],
        "cards": cards,
        "no_images": no_images or "none of the images can be read",
        "legend": [(colours[k], names[k]) for k in shown],
        "classes": [
            (colours[numbers[name]] if name in numbers else "", name, iou) for name, iou in result["per_class"].items()
        ],
        "command": load_run.typed(result["command"], workdir),
        "shown": load_run.shown(workdir),
        "versions": environment.versions(),
        "fields": environment.fields(config, PROBE),
    }


def _cards(source, result, folder):
    """Return the cards of the images whose predictions are kept: image, true mask, predicted mask."""
    split, cards = source.split(result["split"]), []
    for path in sorted(folder.glob("[0-9]*.png"), key=lambda path: int(path.stem)):
        index = int(path.stem)
        if index >= source.splits[split]:
            continue
        try:
            found = decode.decode_numbers(path.read_bytes()).astype(np.uint8)
            spec = data.MasksSpec(len(found))
            content, mask, name = spec.fetch(source, split, index)
            batch = spec.empty(1)
            spec.prepare(batch, 0, content, mask, 0, index)()
        except (OSError, decode.BadImage):
            continue  # skipped in the measuring too
        height, width = spec.scaled(*mask.shape)  # without the padding
        image, truth, found = (x[:height, :width] for x in (batch["image"][0], batch["target"][0], found))
        counted = truth != IGNORED
        cards.append(
            {
                "name": name,
                "image": tiles.data_uri(image, LONGEST),
                "truth": tiles.uri(palette.png(truth), "image/png"),
                "found": tiles.uri(palette.png(found), "image/png"),
                "right": float((truth == found)[counted].mean()) if counted.any() else None,
                "classes": [int(k) for k in np.union1d(truth, found) if k < len(source.mask_names)],
                "ratio": f"{width} / {height}",
            }
        )
    return cards
