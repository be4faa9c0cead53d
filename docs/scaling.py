"""Draw docs/scaling.svg: what an image costs, and what of a step the interconnect takes, as chips of one kind grow.

    qbheat preflight --config configs/imagenet_w720.py --topology v5e:4x4 --json w720-v5e-4x4.json    # and so on
    python docs/scaling.py *.json

Needs matplotlib (the extra `report`). Cost: chips times the longest of a step's three floors, for each image.
"""

import collections
import json
import pathlib
import sys

import matplotlib
from matplotlib.figure import Figure

NAMES = {
    "imagenet_w720": "w720",
    "imagenet_w1440": "w1440",
    "imagenet_resnet50": "ResNet-50",
    "imagenet_vit_b16": "ViT-B/16",
}
COLOURS = dict(zip(NAMES, ("#b8420c", "#d99a3d", "#2a62b8", "#3f8a5c")))


def read(paths, kind="v5e"):
    """{config: [(chips, milliseconds of a chip an image, interconnect over the longest floor)]}, chips ascending."""
    lines = collections.defaultdict(list)
    for path in paths:
        result = json.loads(pathlib.Path(path).read_text())
        if result["topology"].partition(":")[0] == kind and result["bounds"]:
            step, sent = result["bounds"]["step_seconds_at_least"], result["floors"]["interconnect"]
            cost = 1e3 * step * result["chips"] / result["batch_size"]
            lines[pathlib.Path(result["config"]).stem].append((result["chips"], cost, 100 * sent / step))
    return {name: sorted(points) for name, points in lines.items()}


def draw(lines):
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in filter(lines.get, NAMES):
        chips, costs, shares = zip(*lines[name])
        for axes, values in ((left, costs), (right, shares)):
            axes.plot(chips, values, color=COLOURS[name], marker="o", markersize=4, label=NAMES[name])
    for axes, label in (
        (left, "chip-milliseconds an image, at least"),
        (right, "interconnect, % of the longest floor"),
    ):
        axes.set_xscale("log", base=4)
        axes.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
        axes.set_xlabel("v5e chips, the batch as shipped")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(color="#dfd9cf", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "qbheat"  # the same figures, the same file
    draw(read(sys.argv[1:])).savefig(pathlib.Path(__file__).with_suffix(".svg"), metadata={"Date": None})
