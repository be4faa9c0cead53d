"""The matrix of programs that `test_compile.py` compiles ahead of time, and the process that compiles them.

`python -m tests.compile_cells KERNELS` reads names of cells from stdin, one a line, and answers each with one line of JSON.
An abort inside XLA ends this process and not its parent. KERNELS is a file, see `compile_cell`.
"""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import api, methods, rng
from qbheat_jax import config as config_lib
from qbheat_jax.analysis import image_summaries
from qbheat_jax.analysis import target as target_lib
from qbheat_jax.data import device_cache
from qbheat_jax.eval import evaluate
from qbheat_jax.eval.accuracy import Accuracy
from qbheat_jax.eval.average_precision import AveragePrecision
from qbheat_jax.eval.label_free import LabelFree
from qbheat_jax.methods import base
from qbheat_jax.models import detr_detector, layers, mobile_former, mobilenet, registry
from qbheat_jax.models.mmhco import MMHCO, ClipHead
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.models.vit import ViT
from qbheat_jax.probe import encode, encoders, fit, knn, segmentation
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.report import tiles
from qbheat_jax.tasks import detect, finetune
from qbheat_jax.tasks import probe as probe_lib
from qbheat_jax.tools.preflight import compile as compile_lib
from qbheat_jax.tools.preflight import topology
from qbheat_jax.train import config_tables, optim, state
from qbheat_jax.train.checkpoint import _bit_sums

GPU, TPU = "h100:1", "v5e:1x1"

# --- Encoders --------------------------------------------------------------------------------------------------------

# Shrunken members of the registry's families. Together they hold every kind of block, stem, stride and shortcut.
_FORMER = mobile_former.Variant(16, 4, 64, ((3, 3, 24, 2, 3), (1, 3, 24, 1, 3)), width=96)  # as w720
_GROUPED = mobile_former.Variant(8, 3, 64, ((3, 3, 8, 1, 0), (1, 4, 24, 2, 4)), features=64, groups=4)  # as 26m
_V2 = dataclasses.replace(mobilenet.VARIANTS["mobilenet_v2"], rows=((1, 32, 1, 1, 3), (6, 24, 1, 2, 3)))
_LITE = dataclasses.replace(mobilenet.VARIANTS["efficientnet_lite0"], rows=((1, 32, 1, 1, 3), (6, 40, 1, 2, 5)))
_NET_STRIDES = {4: {}, 2: {"last_stride": 1}}
_HEAT = {"dims": (32, 64), "depths": (1, 1)}
_HEAT_STRIDES = {8: {}, 4: {"last_stride": 1}, 2: {"stem_stride": 1}}
_HCNET, _HCNET_STRIDES = {"dims": (64, 128), "depths": (1, 1)}, {8: {}, 4: {"last_stride": 1}}
_CONVNEXT = {"dims": (16, 32, 64, 96), "depths": (1, 1, 2, 1)}
_DINOV3 = {"class_token": True, "position": "rope", "registers": 4, "layer_scale": 1e-5, "mlp": "swiglu"}
_RESNET, _VIT = (registry.ENCODERS[name] for name in ("resnet50", "vit_ti"))

ENCODERS = {
    "former": registry._mobile_former(_FORMER),
    "former_grouped": registry._mobile_former(_GROUPED),
    "mobilenet": registry.Entry(registry.MobileNet, {"variant": _V2}, _NET_STRIDES),
    "lite": registry.Entry(registry.MobileNet, {"variant": _LITE}, _NET_STRIDES),
    "resnet_basic": registry.Entry(ResNet, {"blocks": (1, 1, 1, 1), "bottleneck": False}, _RESNET.strides),
    "resnet": registry.Entry(ResNet, {"blocks": (2, 1, 1, 1), "zero_init": False}, _RESNET.strides),
    "mmhco": registry.Entry(
        MMHCO, {"dims": (16, 32), "depths": (1, 1)}, {8: {}}, registry.ENCODERS["mmhco_nano"].options, head=ClipHead
    ),
    "vheat": registry.Entry(VHeat, _HEAT, _HEAT_STRIDES, registry._VHEAT),
    "vheat_scaled": registry.Entry(
        VHeat, {**_HEAT, "post_norm": True, "layer_scale": True}, _HEAT_STRIDES, registry._VHEAT
    ),
    "vit": registry.Entry(ViT, {"width": 192, "heads": 3, "depth": 2}, _VIT.strides, _VIT.options),
    "vit_rope": registry.Entry(ViT, {"width": 192, "heads": 3, "depth": 2, **_DINOV3}, _VIT.strides, _VIT.options),
    "convnext": registry._convnext(**_CONVNEXT),
    "hcnet": registry._hcnet(_HCNET_STRIDES, **_HCNET),
    "hcnet_a": registry._hcnet(_HCNET_STRIDES, **_HCNET, generation="a"),
}

# --- Train steps -----------------------------------------------------------------------------------------------------

_ALL = {"image_size": 128, "batch_size": 32, "dtype": "bfloat16", "total_steps": 10}
_DECODER = {"decoder.width": 128, "decoder.depth": 1, "decoder.heads": 4}
_DENSE = {"dense.strides": (8, 16), "dense.width": 64, "dense.depth": 1}
_DETR = {"detr.size": "base", "detr.queries": 32, "detr.groups": 2}
_BOXES = {"detector.classes": 10, "data.max_boxes": 16}
_LOCAL = {"data.local_crops": 2, "data.local_size": 64}
_FINOLA = {"finola.width": 64, "finola.paths": 2, "finola.stride": 16, "finola.channels": 16}
OBJECTIVES = {
    "qbheat": (config_tables.PRETRAIN, {**_DECODER, "image_size": 256}),  # its encoder sees crops of the others' size
    "moco": (config_tables.PRETRAIN, {"moco.queue": 512}),
    "simmim": (config_tables.PRETRAIN, {}),
    "mae": (config_tables.PRETRAIN, _DECODER),
    "supervised": (config_tables.PRETRAIN, {"head.classes": 10}),
    "finetune": (config_tables.FINETUNE, {"head.classes": 10}),
    "dense": (config_tables.DETECT, {**_BOXES, **_DENSE}),
    "detr": (config_tables.DETECT, {**_BOXES, **_DETR}),
    "finola": (config_tables.PRETRAIN, _FINOLA),
    "simclr": (config_tables.PRETRAIN, {"simclr.hidden": 256}),
    "vicreg": (config_tables.PRETRAIN, {"vicreg.width": 256}),
    "lejepa": (config_tables.PRETRAIN, {**_LOCAL, "lejepa.hidden": 256, "lejepa.slices": 256}),
    "dino": (config_tables.PRETRAIN, {**_LOCAL, "dino.hidden": 256, "dino.prototypes": 1024}),
    "ijepa": (config_tables.PRETRAIN, _DECODER),
}
_DETR_SIZES = {"small": (64, 4, 1, 2), "base": (64, 4, 0, 1)}  # shrunken as the encoders are

# What a cell sets besides, so that every option that changes the program is in a cell of each family it concerns. No more
# than that: cells of an encoder that are otherwise alike share their kernels, which take most of the time.
_HOG = {"norm_pix": True, "hog": 0.5}
_GROUPS = {"bn_groups": 2, "ema": 0.99}
_PARTS = {"accumulate": 2, "batch_size": 64}
_RECIPE = {f"supervised.{k}": v for k, v in dict(rand_augment=9.0, erasing=0.25, mixup=0.8, cutmix=1.0).items()}
_REMAT = {"remat": "nothing_saveable"}
_TUNE = {"tune": True, "detector.stages": True}
_TOKEN = {"encoder.class_token": True}
OPTIONS = {
    ("former", "qbheat"): {"heat.propagator": "autoregressive", "heat.norm": "layer"},
    ("former", "moco"): {"moco.standardise": True},
    ("former", "simmim"): _REMAT,
    ("former", "supervised"): {**_PARTS, **_RECIPE, "supervised.colour_jitter": 0.4},
    ("former", "finetune"): {"encoder.drop_path": 0.0},
    ("former", "dense"): {"detector.stages": True},
    ("former_grouped", "qbheat"): {"heat.propagator": "power", "heat.norm": "layer"},
    ("former_grouped", "moco"): {"moco.blur_share": 0.0},
    ("former_grouped", "simmim"): {"encoder.stride": 2},
    ("former_grouped", "finetune"): {**_GROUPS, "head.dropout": 0.1},
    ("former_grouped", "dense"): {"tune": True},
    ("former_grouped", "detr"): {"detr.anchors": False},
    ("mmhco", "qbheat"): {**_REMAT, "encoder.routing": "soft", "encoder.fve_pool": "batch"},
    ("mmhco", "supervised"): {"optimizer": "sgd", "encoder.drop_path": 0.1},
    ("mmhco", "finetune"): {**_GROUPS, "mixup": 0.8, "cutmix": 1.0, "encoder.fve_mode": "noise"},
    ("mobilenet", "qbheat"): {"heat.propagator": "exp", "heat.directions": "tied"},
    ("mobilenet", "simmim"): _REMAT,
    ("mobilenet", "supervised"): _PARTS,
    ("mobilenet", "finetune"): {**_GROUPS, "mixup": 0.8},
    ("mobilenet", "dense"): _TUNE,
    ("lite", "qbheat"): {"heat.propagator": "spectral", "quarter.placements": "all9"},
    ("lite", "simmim"): {**_HOG, "simmim.error": "target", "dtype": "float32"},
    ("lite", "finetune"): {"cutmix": 1.0},
    ("lite", "dense"): {"encoder.stride": 2},
    ("lite", "detr"): {"tune": True},
    ("resnet_basic", "qbheat"): {**_HOG, "encoder.stride": 8},
    ("resnet_basic", "moco"): {"encoder.stride": 16},
    ("resnet_basic", "simmim"): _REMAT,
    ("resnet_basic", "finetune"): _GROUPS,
    ("resnet_basic", "dense"): _TUNE,
    ("resnet", "qbheat"): {"heat.propagator": "cosine"},
    ("resnet", "simmim"): {"encoder.stride": 16, "dtype": "float32"},
    ("resnet", "supervised"): {**_PARTS, "encoder.stride": 8, "clip_norm": 1.0},
    ("resnet", "finetune"): {"cutmix": 1.0, "encoder.drop_path": 0.0},
    ("resnet", "dense"): {"tune": True},
    ("vheat", "moco"): {"encoder.embedding": "padded", "encoder.grid": 24},
    ("vheat", "simmim"): {"encoder.stride": 4, "dtype": "float32"},
    ("vheat", "supervised"): {**_PARTS, "encoder.drop_path": 0.1},
    ("vheat", "finetune"): {"encoder.stride": 2, "mixup": 0.8},
    ("vheat", "dense"): {"encoder.folded": True},
    ("vheat", "detr"): {"encoder.folded": True},
    ("vheat_scaled", "qbheat"): {"encoder.drop_path": 0.1},
    ("vheat_scaled", "simmim"): _REMAT,
    ("vheat_scaled", "supervised"): _PARTS,
    ("vheat_scaled", "finetune"): {"cutmix": 1.0, "encoder.drop_path": 0.0},
    ("vheat_scaled", "dense"): {**_TUNE, "encoder.outnorm": True},
    ("vit", "qbheat"): {"heat.propagator": "power", "heat.directions": "tied", "encoder.drop_path": 0.1},
    ("vit", "moco"): {**_TOKEN, "encoder.position": "learnt", "encoder.grid": 8},
    ("vit", "simmim"): {"remat": "dots_saveable", "encoder.stride": 8, "dtype": "float32"},
    ("vit", "mae"): {**_TOKEN, **_REMAT, **_HOG},
    ("vit", "supervised"): {**_TOKEN, **_PARTS},
    ("vit", "finetune"): {"mixup": 0.8, "cutmix": 1.0},
    ("vit", "dense"): {"tune": True},
    ("vit", "detr"): {"detr.size": "small"},
    ("vit", "dino"): {
        **_TOKEN,
        "encoder.position": "learnt",
        "encoder.grid": 8,
        "dino.gain": True,
        "weight_decay_end": 0.4,
    },
    ("vit", "ijepa"): _REMAT,
    ("vit_rope", "qbheat"): {"encoder.drop_path": 0.1},
    ("vit_rope", "simmim"): {"dtype": "float32"},
    ("vit_rope", "mae"): _REMAT,
    ("vit_rope", "supervised"): {**_PARTS, "encoder.fc_norm": True},
    ("vit_rope", "finetune"): {"encoder.pre_norm": True},
    ("vit_rope", "dense"): {"tune": True},
    ("convnext", "qbheat"): {"encoder.drop_path": 0.1},
    ("convnext", "moco"): {"encoder.stride": 16},
    ("convnext", "simmim"): {"dtype": "float32"},
    ("convnext", "supervised"): {**_PARTS, **_REMAT},
    ("convnext", "dense"): _TUNE,
    ("hcnet", "qbheat"): {"encoder.drop_path": 0.1},
    ("hcnet", "simmim"): {"dtype": "float32"},
    ("hcnet", "supervised"): _PARTS,
    ("hcnet", "finetune"): {"ema": 0.99},
    ("hcnet", "dense"): _TUNE,
    ("hcnet_a", "simmim"): _REMAT,
    ("hcnet_a", "supervised"): {"encoder.drop_path": 0.1},
    ("hcnet_a", "detr"): {"tune": True},
}


# The TPU's compiler takes ten times as long, the more the larger the arrays are.
_SMALL = {"image_size": 32, "batch_size": 8}
_SMALL_LOCAL = {**_LOCAL, "data.local_size": 16}


def config(encoder, objective, **fields):
    table, own = OBJECTIVES[objective]
    return config_lib.resolve({**_ALL, **own, **fields, "encoder.name": encoder, "objective": objective}, table)


def _train(devices, encoder, objective, options):
    """Lower the train step as the loop builds it, with the learning-rate multipliers of fine-tuning and detection."""
    made = config(encoder, objective, **options)
    multipliers = None
    if objective == "finetune":
        encoder = methods.build_encoder(made)
        multipliers = functools.partial(finetune.lr_multipliers, encoder=encoder, decay=made.layer_decay)
    elif methods.METHODS[objective].TASK == base.DETECT:
        multipliers = functools.partial(detect.lr_multipliers, config=made)
    yield compile_lib.build(made, devices, lr_multipliers=multipliers).trace().lower()


# --- Other programs --------------------------------------------------------------------------------------------------


class _Shapes:
    """What a config's programs take: shapes with shardings on the devices, by the state's own rules."""

    def __init__(self, config, devices):
        self.config, self.devices = config, devices
        self.step = compile_lib.build(config, devices)
        self.objective, self.state, self.batch = self.step.objective, self.step.state, self.step.batch
        self.whole = jax.sharding.NamedSharding(self.step.mesh, jax.sharding.PartitionSpec())

    @property
    def variables(self):
        return self.state.variables()

    @property
    def encoder(self):
        return {name: tree["encoder"] for name, tree in self.variables.items() if "encoder" in tree}

    @property
    def model(self):
        return api.Model(self.config, self.variables, 1)

    def frozen(self, variables):
        spec = encoders.evaluation_spec(self.config, self.config.image_size)
        return encoders._encoder(self.objective.encoder, self.objective.pixels, variables, spec, "", "")

    def array(self, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.whole)

    def images(self, *count):
        return self.array(*(count or (self.config.batch_size,)), *self.batch["image"].shape[1:], dtype=jnp.uint8)

    def put(self, tree):
        """Arrays or shapes -> shapes on the devices."""
        return jax.tree.map(lambda x: self.array(*x.shape, dtype=x.dtype), tree)

    def evaluation(self, metric):
        """The program of the evaluator."""
        count, where = self.config.batch_size, self.batch["mask"].sharding
        placed = {
            "index": jax.ShapeDtypeStruct((count,), jnp.int32, sharding=where),
            "scale": jax.ShapeDtypeStruct((count, 2), jnp.float32, sharding=where),
            **self.batch,
        }
        batch = {name: placed[name] for name in metric.inputs}
        return evaluate.step(metric, self.step.mesh).lower(self.variables, batch)

    def copies(self, tree):
        """What `devices.pmap_batches` gives a pmapped function: a leading axis for the devices."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(self.devices), *x.shape), x.dtype), tree)


def _init(devices, encoder):
    """The program that makes the parameters."""
    made = config(encoder, "qbheat")
    shapes = _Shapes(made, devices)
    make = state.initialiser(shapes.objective, optim.optimizer(made, lambda step: 1e-3), shapes.batch, made.ema)
    where = jax.tree.map(lambda x: x.sharding, shapes.state)
    key = jax.eval_shape(lambda: rng.root(0))
    yield jax.jit(make, out_shardings=where).lower(shapes.put(key))


def _classify(devices, encoder):
    """The logits of `classify` and of fine-tuning's evaluation."""
    shapes = _Shapes(config(encoder, "supervised", dtype="float32"), devices)
    yield shapes.evaluation(Accuracy(shapes.objective, None, "val", 10))


def _evaluate(devices, encoder):
    """The loss on a validation split, and the pictures for TensorBoard while a run trains."""
    shapes = _Shapes(config(encoder, "qbheat", image_size=128, **{"data.source": "synthetic:8"}), devices)
    yield shapes.evaluation(LabelFree(shapes.objective))
    yield image_summaries.ImageSummaries(shapes.config, shapes.objective)._compute.lower(shapes.variables)


def _analyse(devices, encoder):
    """What an analysis runs on the devices: maps, the learnt operator's steps and grids, reconstructions."""
    shapes = _Shapes(config(encoder, "qbheat", image_size=128), devices)
    frozen = shapes.frozen(None)
    yield target_lib._encode.lower(frozen.features, shapes.encoder, shapes.images())
    decoder = shapes.objective.decoder
    heat, width = shapes.variables["params"]["decoder"]["heat"], shapes.objective.encoder.width
    yield target_lib._carry.lower(heat, decoder.heat, shapes.array(4096, width), "x-", 1, 4)
    yield target_lib._extrapolate.lower(heat, decoder.heat, shapes.array(32, 4, 4, width), 4)
    placed = shapes.array(32, dtype=jnp.int32)
    yield shapes.model._reconstruct.lower(shapes.variables, shapes.images(), placed, True)
    pixels = shapes.array(32, 128, 128, 3), shapes.array(32, 128, 128, dtype=bool)
    yield tiles._settle.lower(*pixels)


def _detect(devices, encoder, detector):
    """Detections, which AP is measured on."""
    shapes = _Shapes(config(encoder, detector), devices)
    yield shapes.evaluation(AveragePrecision(shapes.objective, None, "val"))


def _probe(devices, encoder):
    """Features for a probe, whole and pooled; linear heads and a block over a grid of rates; neighbours."""
    shapes = _Shapes(config(encoder, "supervised"), devices)
    about = {"data.source": "synthetic:8", "image_size": 128, "batch_size": 32, "encoder.name": encoder}
    frozen = shapes.frozen(shapes.encoder)
    grid = {"learning_rates": (0.1, 1.0), "warmup_epochs": 1.0, "total_epochs": 4.0}
    dropped = {"head.heads": 4, "head.dropout": 0.1, "head.drop_path": 0.1}
    for fields in (
        {"protocol": "lin", "weight_decays": (0.0, 1e-4), **grid},
        {"protocol": "tran-1", "optimizer": "adamw", "head.pool": 2, **grid, **dropped},
    ):
        made = config_lib.resolve({**about, **fields}, PROBE)
        encoding = encode.Encoding(frozen, made, None, 8)
        yield encoding.mapped.lower(shapes.copies(shapes.encoder), shapes.images(1, 32))
        recipe = probe_lib._recipe(made, 10, encoding.shape[-1])
        (params, opt_state), train = fit._trainer(recipe, encoding.shape, 8, 2, rng.root(0))
        count = 64
        yield train.lower(
            shapes.put((params, opt_state)), shapes.array(count, *encoding.shape), shapes.array(count, dtype=jnp.int32),
            shapes.array(count), shapes.array(2, 32, dtype=jnp.int32), shapes.array(2, dtype=jnp.int32),
        )  # fmt: skip
        scorer = fit._scorer(recipe.head, tuple(devices))
        yield scorer.lower(shapes.copies(shapes.put(params)), shapes.array(1, 32, *encoding.shape))
    bank = {"unit": shapes.array(1, 4096, 96), "counts": shapes.array(1, 4096, dtype=bool)}
    yield knn.searcher(264).lower(bank, shapes.array(1, 32, 96))


def _segment(devices, encoder):
    """The train step of a grid of cell classifiers, and the masks that they and neighbours predict."""
    shapes = _Shapes(config(encoder, "supervised"), devices)
    about = {"data.source": "scenes:8", "image_size": 128, "batch_size": 32, "encoder.name": encoder}
    grid = {"learning_rates": (0.1, 1.0), "weight_decays": (1e-4,), "total_epochs": 4.0}
    made = config_lib.resolve({**about, "protocol": "seg-lin", "optimizer": "adamw", **grid}, PROBE)
    encoding = encode.Encoding(shapes.frozen(shapes.encoder), made, None, 8)
    recipe = probe_lib._recipe(made, 11, encoding.shape[-1])
    (params, opt_state), train = fit._trainer(recipe, encoding.shape, 8, 2, rng.root(0))
    count, cells = 64, encoding.shape[:2]
    yield train.lower(
        shapes.put((params, opt_state)), shapes.array(count, *encoding.shape),
        shapes.array(count, *cells, 11, dtype=jnp.uint16), shapes.array(count),
        shapes.array(2, 32, dtype=jnp.int32), shapes.array(2, dtype=jnp.int32),
    )  # fmt: skip
    predict = segmentation._predictor(recipe.head, 128, tuple(devices))
    yield predict.lower(shapes.copies(shapes.put(params)), shapes.array(1, 32, *encoding.shape))
    yield segmentation._scaled(128, tuple(devices)).lower({}, shapes.array(1, 32, 1, *cells, 11))


def _cache(devices, encoder):
    """Images kept on the devices: their crops; and the sums by which a checkpoint is checked."""
    shapes = _Shapes(config(encoder, "simmim"), devices)
    kept, example = (3, 256, 256), dict(sharding=shapes.batch["mask"].sharding)
    words = device_cache._padded(int(np.prod(kept))) // 512

    def by_row(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, **example)

    yield device_cache._crop.lower(
        by_row(64, words, 128, dtype=jnp.uint32), by_row(32, dtype=jnp.int32), by_row(32, 4), by_row(32, dtype=bool),
        mesh=shapes.step.mesh, shape=kept, size=128,
    )  # fmt: skip
    yield device_cache._grey_where_masked.lower(shapes.batch["image"], shapes.batch["mask"])
    yield _bit_sums.lower(shapes.state)


def _strided(devices, dtype):
    """The gradient of a strided 1x1 convolution of a map that has other readers, as at the entry of a ResNet's stage."""
    whole = jax.sharding.SingleDeviceSharding(devices[0])
    x, gain = (jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape in ((2, 16, 16, 64), (64,)))
    for groups in (1, 4):
        conv = layers.Conv(128, kernel=1, stride=2, groups=groups, dtype=dtype)
        kernel = jax.ShapeDtypeStruct((1, 1, 64 // groups, 128), jnp.float32, sharding=whole)

        def loss(kernel, x, gain, conv=conv):
            y = jax.nn.relu(x * gain)
            shortcut = conv.apply({"params": {"kernel": kernel}}, y)
            return (shortcut.astype(jnp.float32) ** 2).sum() + (y.astype(jnp.float32) ** 2).sum()

        yield jax.jit(jax.grad(loss, (0, 1, 2))).lower(kernel, x, gain)


# --- The matrix ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """`programs`: function of the devices of `target` and of `arguments` -> iterator of lowered programs."""

    programs: Any
    arguments: tuple
    target: str = GPU


def _trains(objective, encoder):
    """Whether an objective trains encoders of this class."""
    if encoder.takes_clips:
        return methods.METHODS[objective].takes_clips
    return objective not in ("mae", "ijepa") or encoder.takes_keep


def _cells():
    cells = {}

    def add(name, programs, *arguments, target=GPU):
        cells[f"{name}-{target.partition(':')[0]}"] = Cell(programs, arguments, target)

    for dtype in ("float32", "bfloat16"):
        add(f"strided_conv-{dtype}", _strided, dtype)
    for encoder, entry in ENCODERS.items():
        for objective in OBJECTIVES:
            if _trains(objective, entry.module):
                add(f"{encoder}-{objective}", _train, encoder, objective, OPTIONS.get((encoder, objective), {}))
    for encoder, objective, options in (
        ("former", "qbheat", {}),
        ("former", "finola", {}),
        ("lite", "finetune", {}),
        ("resnet_basic", "supervised", _RECIPE),
        ("vit", "mae", {}),
        ("vit_rope", "mae", {}),
        ("convnext", "simmim", {}),
        ("vheat", "qbheat", {}),
        ("hcnet", "supervised", {}),
        ("hcnet_a", "simmim", {}),
        ("mmhco", "qbheat", {}),
        ("mmhco", "supervised", {}),
        ("mobilenet", "simclr", {}),
        ("mobilenet", "vicreg", {}),
        ("mobilenet", "lejepa", _SMALL_LOCAL),
        ("vit", "dino", {**_SMALL_LOCAL, "encoder.position": "learnt", "encoder.grid": 2}),
        ("vit", "ijepa", {"encoder.stride": 8}),
    ):
        add(f"{encoder}-{objective}", _train, encoder, objective, {**_SMALL, **options}, target=TPU)
    for encoder in ("former_grouped", "lite", "resnet_basic", "vit", "hcnet"):
        add(f"{encoder}-init", _init, encoder)
    for encoder in ("former_grouped", "mmhco", "resnet_basic", "vit"):
        add(f"{encoder}-classify", _classify, encoder)
    add("resnet-evaluate", _evaluate, "resnet")
    add("mobilenet-analyse", _analyse, "mobilenet")
    add("resnet-detect_dense", _detect, "resnet", "dense")
    add("vit-detect_detr", _detect, "vit", "detr")
    for encoder in ("mmhco", "vit"):
        add(f"{encoder}-probe", _probe, encoder)
    for target in (GPU, TPU):
        add("vit-segment", _segment, "vit", target=target)
    add("mobilenet-device_cache", _cache, "mobilenet")
    return cells


CELLS = _cells()

# Encoders of one family. The test command compiles every fourth method for a family, by its members in turn, so each method
# for one family or two; MAE, and FINOLA with one encoder. The other cells are `weekly`: run `pytest -m weekly`.
FAMILIES = (
    ("former", "former_grouped"),
    ("mobilenet", "lite"),
    ("resnet_basic", "resnet"),
    ("vheat", "vheat_scaled"),
    ("hcnet", "hcnet_a"),
    ("mmhco",),
    ("vit", "vit_rope"),
    ("convnext",),
)
# Methods of several crops differ little between encoders: one cell each in the test command.
_CROPS = ("simclr", "vicreg", "lejepa", "dino")
_OFTEN = ("former_grouped-simclr", "mobilenet-vicreg", "resnet_basic-lejepa", "vit-dino")
_WEEKLY_TPU = (
    "mobilenet-simclr",
    "mobilenet-vicreg",
    "mobilenet-lejepa",
    "vit-ijepa",
    "vit-dino",
    "vit_rope-mae",
    "convnext-simmim",
    "former-finola",
    "vit-segment",
    "vheat-qbheat",
    "hcnet-supervised",
    "hcnet_a-simmim",
    "mmhco-qbheat",
    "mmhco-supervised",
)
# Besides those that `_weekly` chooses: each has a neighbour in the test command, of the same encoder or the same method.
_WEEKLY_GPU = (
    *("former-finola", "former_grouped-finetune", "lite-supervised", "resnet_basic-detr", "resnet_basic-lejepa"),
    *("mobilenet-vicreg", "convnext-moco", "vheat_scaled-moco", "hcnet-finetune", "vit_rope-mae", "vit_rope-ijepa"),
    *("mmhco-classify", "mmhco-probe", "resnet_basic-classify", "former_grouped-classify"),
    *("lite-init", "hcnet-init", "resnet_basic-init"),
)
_WEEKLY = {*(f"{cell}-v5e" for cell in _WEEKLY_TPU), *(f"{cell}-h100" for cell in _WEEKLY_GPU)}


def _weekly():
    names = [name for name in OBJECTIVES if name not in ("mae", "finola", "ijepa", *_CROPS)]
    cells = {f"{encoder}-{name}" for encoder in ENCODERS for name in (*names, "finola")} - {"former-finola"}
    for k, family in enumerate(FAMILIES):
        for n, name in enumerate(names):
            if (n + k) % 4 == 0:
                cells.remove(f"{family[(n + k) // 4 % len(family)]}-{name}")
    cells |= {f"{encoder}-{name}" for encoder in ENCODERS for name in _CROPS} - {*_OFTEN}
    return {f"{cell}-{GPU.partition(':')[0]}" for cell in cells} & set(CELLS) | _WEEKLY


WEEKLY = _weekly()
assert WEEKLY <= set(CELLS) and {encoder for family in FAMILIES for encoder in family} == set(ENCODERS)

# --- The process -----------------------------------------------------------------------------------------------------

# On a card XLA times several ways to do a product. Without one it takes the first guess of Triton, which may have no tiles
# that fit; on the card cuBLAS would then do it, as it does with these. Fusion into products comes before and is the same.
UNTIMED = {"xla_gpu_experimental_autotune_backends": "CUDNN,CUBLASLT,CUBLASLT_FISSION,NATIVE_EMITTER"}


def _compile(lowered, options):
    try:
        lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "Couldn't find output tile sizes" not in str(error):
            raise
        lowered.compile(compiler_options={**options, **UNTIMED})


def compile_cell(name, kernels):
    """Compile the programs of a cell -> how many there are.

    Args:
      name: A key of CELLS.
      kernels: A file in which XLA keeps the machine code of a GPU's kernels, so that those of one cell serve the next.
    """
    cell, count, options = CELLS[name], 0, {}
    if cell.target == GPU:
        options = {"xla_gpu_kernel_cache_file": kernels, "xla_gpu_enable_llvm_module_compilation_parallelism": True}
    where = topology.parse(cell.target)
    topology.prepare(where)
    devices = list(topology.devices(where))
    # What makes a mesh or a pmap makes it of the target's devices.
    with mock.patch.multiple(jax, devices=lambda *_: devices, local_devices=lambda *_: devices):
        for lowered in cell.programs(devices, *cell.arguments):
            _compile(lowered, options)
            count += 1
    jax.clear_caches()
    fit._scorer.cache_clear()
    return count


def resident():
    """Return the bytes of memory that this process holds. Its `ru_maxrss` would begin with its parent's."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main(kernels):
    # Here and not where they are defined: the tests that import this module know the registry as it is.
    registry.ENCODERS.update(ENCODERS)
    detr_detector.SIZES.update(_DETR_SIZES)
    gc.freeze()  # as in conftest.py
    gc.set_threshold(50_000, 10, 10)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        answer = {}
        try:
            answer["programs"] = compile_cell(line.strip(), kernels)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        answer["bytes"] = resident()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
