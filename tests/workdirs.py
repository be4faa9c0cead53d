"""Workdirs as runs leave them, made without training: what the tests of the pages write their pages from."""

import json
import types

import jax
import numpy as np

from qbheat_jax import cli, data, methods, report, rng
from qbheat_jax import config as config_lib
from qbheat_jax.data import palette
from qbheat_jax.eval import average_precision, miou
from qbheat_jax.ops import images, quarters
from qbheat_jax.ops.heat import Heat
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.report import neighbours_page
from qbheat_jax.train import config_tables
from qbheat_jax.train.checkpoint import Checkpoints

SIZE, CHANNELS = 32, 8

# A run that compiles soon, for the analysis.
ANALYSED = {
    "data.source": "synthetic:128", "image_size": SIZE, "batch_size": 16, "total_steps": 2, "encoder.name": "pebble",
    "decoder.width": 16, "decoder.depth": 0, "decoder.heads": 2, "heat.propagator": "exp", "heat.init_scale": 0.2,
    "quarter.placements": "center", "norm_pix": True,
}  # fmt: skip

# A comparison of two methods, by two probes and two baselines.
BASE = {
    "data": {"source": "synthetic:64", "eval_split": ""}, "image_size": 32, "batch_size": 16, "total_steps": 2,
    "encoder": {"name": "pebble"}, "decoder": {"width": 16, "depth": 0, "heads": 2}, "learning_rate": 0.01,
    "log_every": 1, "checkpoint_every": 2, "monitors": {"images": 0},
}  # fmt: skip
MONITORS = {"monitors": {"images": 0}}
LIN = {"protocol": "lin", "optimizer": "ridge", "weight_decays": (0.01, 1.0), "data": {"source": "photos"}, **MONITORS}
KNN = {"protocol": "knn", **MONITORS, "knn": {"neighbours": (1, 5), "temperatures": (0.1,)}}
COMPARISON = {
    "seeds": (0, 1),
    "pretrain": "base.py",
    "all": {"weight_decay": 0.0},
    "methods": {
        "supervised": {"objective": "supervised"},
        "masked": {"objective": "simmim", "simmim": {"mask_size": 8}},
    },
    "probes": {"linear": "lin.py", "knn": "knn.py"},
    "baselines": ("random", "pixels"),
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- A run -----------------------------------------------------------------------------------------------------------


def make_config(**fields):
    return config_tables.resolve({"image_size": SIZE, "batch_size": 16, "total_steps": 40, **fields})


def make_model(config):
    """Stands in for `qbheat_jax.load`: a reconstruction that is grey, and heat matrices of the right shapes."""
    rng = np.random.default_rng(0)
    heat = {name: rng.normal(0, 0.1, (CHANNELS, CHANNELS)).astype(np.float32) for name in ("x+", "x-", "y+", "y-")}

    def reconstruct(images, quarter, blend):
        hidden = quarters.masked(SIZE, SIZE)[quarter][..., None]
        return np.where(hidden, np.uint8(128), images)

    variables = {"params": {"encoder": {"kernel": np.zeros((10, 123))}, "decoder": {"heat": heat}}}
    choice = Heat(**config.heat.to_dict())
    objective = types.SimpleNamespace(
        pixels=images.Pixels(), operator=lambda params: (params["decoder"]["heat"], choice) if choice.names else None
    )
    return types.SimpleNamespace(
        config=config,
        variables=variables,
        step=40,
        reconstruct=reconstruct,
        objective=objective,
        encoder=types.SimpleNamespace(takes_clips=False),
    )


def make_images(count=10, size=SIZE):
    images = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8)
    names = tuple(f"<class {i}>" for i in range(count))
    return report.Sample(images, names, "test", sizes={"train": 320, "test": count})


def write_config(workdir, **fields):
    """Makes of a folder the workdir of a run that has only just been set up."""
    (workdir / "config.json").write_text(config_lib.to_json(make_config(**fields)))


def add_results(workdir):
    """Adds to a workdir what a run and its probes log and measure."""
    train = [
        {"step": s, "train/loss": 1 / s, "train/variance": 1.0, "train/learning_rate": 1e-3, "train/data_wait": 0.0421,
         "train/images_per_second": 567.0} for s in (1, 20, 40)
    ]  # fmt: skip
    online = [
        {
            "step": s,
            "online/rankme": 9.0 + s,
            "online/lidar": 7.25,
            "online/alpha_req": 1.5,
            "online/knn": 0.5 + s / 100,
        }
        for s in (20, 40)
    ]
    lines = [*train, *online, {"step": 40, "val/loss": 0.2468, "val/variance": 0.987}]
    write_lines(workdir / "metrics.jsonl", lines)
    command = f"qbheat pretrain --config configs/photos.py --workdir {workdir.resolve()}"
    write_json(workdir / "summary.json", {"step": 40, "seconds": 201.0, "images_per_second": 432.1, "command": command})
    add_probe(workdir, "lin", "lin", str(workdir), 0.8123)
    add_probe(workdir, "lin-random", "lin", "random", 0.6612)
    add_probe(workdir, "lin-pixels", "lin", "pixels", 0.3021)
    add_probe(workdir, "lin-histogram", "lin", "histogram", 0.4911)
    for seed, top1 in enumerate((0.84, 0.86)):
        add_probe(workdir, f"tran-{seed}", "tran-1", str(workdir), top1, seed)


def add_probe(workdir, name, protocol, init, top1, seed=0, **more):
    result = {
        "protocol": protocol, "init": init, "data": "photos", "top1": top1, "top5": 0.977, "n": 1000, "seed": seed,
        "classes": 20, "chance": 0.05, "hparams": {"learning_rate": 0.3}, "seconds": 20.4,
        "command": f"qbheat probe --workdir {workdir.resolve()} --protocol {protocol}", **more,
    }  # fmt: skip
    write_json(workdir / "probe" / name / "result.json", result)
    curve = [{"step": epoch, "probe/loss": 1.0, "probe/holdout_top1": top1 * epoch / 3} for epoch in (1, 2, 3)]
    write_lines(workdir / "probe" / name / "metrics.jsonl", curve)


def add_detectors(workdir):
    """Adds the results of three detectors: two seeds on the run's encoder, one on the untrained encoder."""
    for name, init, seed, ap in (("a", str(workdir), 0, 0.2), ("b", str(workdir), 1, 0.3), ("c", "random", 0, 0.1)):
        result = {
            "protocol": "dense", "init": init, "data": "scenes", "AP": ap, "AP50": 2 * ap, "AP75": None, "seed": seed,
            "seconds": 60, "command": f"qbheat detect --init {init} --seed {seed}",
        }  # fmt: skip
        write_json(workdir / "detect" / name / "result.json", result)


def analyse_run(workdir, **fields):
    """Makes a run of two checkpoints in a workdir, and analyses it there by the command line. `fields` go over ANALYSED."""
    fields = config_tables.resolve({**ANALYSED, **fields})
    batch = {"image": np.zeros((1, SIZE, SIZE, 3), np.uint8), "quarter": np.full(1, 4, np.int32)}
    variables = jax.device_get(jax.jit(methods.build(fields).init)(rng.root(0), batch))
    saved = Checkpoints(workdir, keep=2)
    for step in (1, 2):
        decoder = variables["params"]["decoder"]
        decoder = {**decoder, "heat": {name: step * a for name, a in decoder["heat"].items()}}
        params = {**variables["params"], "decoder": decoder}
        state = {"step": np.int32(step), **variables, "params": params, "opt_state": {}, "ema": {}}
        saved.save(step, state, 0, config_lib.to_json(fields))
        saved.wait()
    saved.close()
    (workdir / "config.json").write_text(config_lib.to_json(fields))
    assert cli.main(["analyse", "--init", str(workdir), "--workdir", str(workdir), "--config.images", "32"]) == 0


# --- A detector ------------------------------------------------------------------------------------------------------


def detector(workdir, source="scenes:64"):
    """Makes the workdir of a detector that finds two of three boxes, the middle one off its place."""
    config = config_lib.resolve({"data.source": source, "total_steps": 40}, config_tables.DETECT)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    truth = data.open_source("scenes:64", image_size=config.image_size, tfds_dir="").annotations("val")
    found = [
        {
            **{key: a[key] for key in ("image_id", "category_id")},
            "score": 1 / (2 + n % 7),
            "bbox": [a["bbox"][0] + (n % 3 == 1) * a["bbox"][2], *a["bbox"][1:]],
        }
        for n, a in enumerate(truth["annotations"]) if n % 3 < 2
    ]  # fmt: skip
    figures, per_class, curves = average_precision.measure(truth, found, [image["id"] for image in truth["images"]])
    result = {
        **figures, "per_class": per_class, "protocol": "dense", "init": "random", "encoder": "pebble", "frozen": True,
        "data": source, "step": 40, "n_train": 64, "n": len(truth["images"]), "seconds": 12.0, "skipped_files": 3,
        "seed": 0, "command": f"qbheat detect --workdir {workdir.resolve()}",
    }  # fmt: skip
    for name, value in (("result", result), ("detections", found), ("curves", curves)):
        write_json(workdir / f"{name}.json", value)
    lines = [{"step": s, "train/loss": 1 / s, "train/learning_rate": 1e-3} for s in (1, 20, 40)]
    lines += [
        {"step": s, f"{config.data.eval_split}/AP": s / 100, f"{config.data.eval_split}/AP50": s / 60} for s in (20, 40)
    ]
    write_lines(workdir / "metrics.jsonl", lines)


# --- A segmentation --------------------------------------------------------------------------------------------------


def segmentation(workdir, source="scenes:64"):
    """Makes the workdir of a segmentation probe that finds every mask one pixel too far down."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = config_lib.resolve({"protocol": "seg-lin", "data.source": source, "image_size": 64}, PROBE)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    scenes, spec, total = data.open_source("scenes:64"), data.MasksSpec(64), 0
    (workdir / "predictions").mkdir()
    for index in range(scenes.splits["test"]):
        batch, (image, mask, _) = spec.empty(1), spec.fetch(scenes, "test", index)
        spec.prepare(batch, 0, image, mask, 0, index)()
        found = np.roll(batch["target"][0], 1, 0)
        total = total + miou.pairs(batch["target"][0], found, len(scenes.mask_names))
        (workdir / "predictions" / f"{index}.png").write_bytes(palette.png(found))
    constant = miou.figures(miou.constant(total.sum(1), 0), scenes.mask_names)
    result = {
        **miou.figures(total, scenes.mask_names), "metrics": list(miou.QUOTED), "protocol": "seg-lin", "init": "random",
        "encoder": "pebble", "data": source, "split": "test", "n": 8, "n_train": 72, "n_holdout": 8, "seed": 0,
        "hparams": {"optimizer": "adamw", "learning_rate": 0.016}, "constant": {"class": "background", **constant},
        "holdout_mIoU": 0.5, "seconds": 12.0, "command": f"qbheat probe --workdir {workdir.resolve()}",
    }  # fmt: skip
    write_json(workdir / "result.json", result)


# --- A comparison ----------------------------------------------------------------------------------------------------


def comparison_config(folder, **fields):
    """Writes the config of the comparison, with some fields otherwise, and the files it names -> its path."""
    for name, content in (("base", BASE), ("lin", LIN), ("knn", KNN), ("comparison", COMPARISON | fields)):
        (folder / f"{name}.py").write_text(f"def get_config():\n    return {content!r}\n")
    return str(folder / "comparison.py")


def compared(plan, workdir):
    """Makes the cells of a comparison in its workdir, as if all had been run."""
    encoders = list(dict.fromkeys(cell.encoder for cell in plan.cells()))
    for n, cell in enumerate(plan.cells()):
        folder = workdir / cell.path
        if cell.probe:
            result = {"top1": 0.4 + n / 50, "top5": 0.9, "n": 100, "chance": 0.1, "seconds": 1.0, "seed": cell.seed}
            # RankMe rises from encoder to encoder as the top-1 does.
            rank = encoders.index(cell.encoder)
            result |= {"rankme": 5.0 + rank, "lidar": 30.0 - rank, "alpha_req": 1.0}
            write_json(folder / "result.json", {**result, "protocol": cell.config.protocol})
        else:
            (folder / "checkpoints" / str(cell.method.steps)).mkdir(parents=True)
            summary = {"step": cell.method.steps, "steps_run": cell.method.steps, "seconds": 4.0 + n}
            write_json(
                folder / "summary.json", {**summary, "images_per_second": 8.0 / (1 + n), "gflops_per_image": 0.5 + n}
            )


# --- Several runs ----------------------------------------------------------------------------------------------------


def several(folder):
    """Makes a directory of runs in every state, with probes and detectors, and of folders that are none. Returns it."""
    for n, name in enumerate(("first", "second", "deep/third", "fourth")):
        run = folder / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(config_lib.to_json(make_config(**{"seed": n, "data.source": "photos"})))
        lines = [
            {"step": s, "train/loss": (n + 1) / s, "train/learning_rate": 1e-3 / (n + 1), "val/loss": (n + 1.2) / s}
            for s in range(4, 41 - 8 * (name != "first"), 4)
        ]  # fmt: skip
        write_lines(run / "metrics.jsonl", lines)
        (run / "checkpoints" / "4").mkdir(parents=True)
    add_results(folder / "first")
    write_json(folder / "first" / "summary.json", {"step": 40})
    for name, init, top1 in (("a", "second", 0.7), ("b", "second", 0.8), ("c", "deep/third", 0.9)):
        result = {"protocol": "tran-1", "init": str(folder / init), "data": "photos", "top1": top1}
        write_json(folder / "probes" / name / "result.json", result)
        write_json(folder / "probes" / name / "config.json", {"protocol": "tran-1"})
    ended = {"second": {"ended": "failed", "reason": "the loss is nan at step 33"}, "deep/third": {}}
    for name, content in ended.items():
        write_json(folder / name / ".lock", {"pid": 1, "host": "here", "since": "now", **content})
    for name, text in (("torn", '{"seed": 0, "data'), ("foreign", '{"model_type": "vit"}'), ("list", "[1]")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    return folder


# --- Neighbours ------------------------------------------------------------------------------------------------------


def neighbours(folder):
    """Writes a page of two queries -> its path. One neighbour has no picture, and large and oblong ones are among them."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    near = [{"name": f"/a/long/path/of/images/{n}.jpg", "similarity": 1 - n / 10, "class": "cats"} for n in range(9)]
    queries = [{"query": f"photo {n}.png", "neighbours": near} for n in range(2)]
    about = {"init": "runs/photos", "among": "all.npz", "n": 1234, "encoder": "pebble", "step": 40, "queries": queries}
    shown = [(pixels[:32, :32], [pixels, None, *[pixels[:64, :64]] * 7])] * 2
    return neighbours_page.write(about, shown, folder / "neighbours.html")
