"""What a benchmark is asked for, and what cannot be, said before anything is compiled."""

import dataclasses
import math
import pathlib

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.tools.bench import peers
from qbheat_jax.train import runtime

PARTS = ("forward", "step", "heat", "input")
PEERS = ("eager", "channels-last", "compile")
_PAIRED = ("qbheat", "simmim")
# The grids that cost is compared over are a half, one and one and a half times --cells; each needs a multiple of 4.
CELLS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line's, see cli.py. `what`: one of PARTS, or all. `threads` 0: all cores that this process may use."""

    what: str = "all"
    encoders: tuple = ("mobile_former_294m", "mobilenet_v2", "resnet50", "vit_s")
    peers: tuple = PEERS
    batch: int = 16
    size: int = 224
    pretrain_size: int = 256
    classes: int = 1000
    dtype: str = "float32"
    heat_batch: int = 256
    width: int = 720
    cells: int = 16
    images: int = 256
    rounds: int = 5
    seconds: float = 1.0
    limit: float = 600.0
    threads: int = 0
    json: str = ""

    @property
    def parts(self):
        return PARTS if self.what == "all" else (self.what,)


def check(options):
    """The options with the number of threads filled in. Raises UserError, one sentence, for what cannot be."""
    o = options
    if o.what not in (*PARTS, "all"):
        raise UserError(f"bench {o.what}: it takes {', '.join(PARTS)} or all")
    for name, least in (
        ("batch", 1), ("size", 1), ("pretrain_size", 1), ("heat_batch", 1), ("width", 1), ("images", 1), ("rounds", 1),
        ("seconds", 0), ("limit", 0), ("threads", 0),
    ):  # fmt: skip
        value = getattr(o, name)
        if not (math.isfinite(value) and value >= least):
            raise UserError(f"--{name.replace('_', '-')} {value}: it takes a number that is at least {least}")
    if o.dtype not in registry.DTYPES:
        raise UserError(f"--dtype {o.dtype}: it takes {' or '.join(registry.DTYPES)}")
    wrong = [name for name in o.peers if name not in PEERS]
    if wrong:
        raise UserError(f"--peers {wrong[0]}: it takes none, or some of {', '.join(PEERS)}")
    if {"forward", "step"} & set(o.parts):
        _check_encoders(o)
    if "heat" in o.parts and (o.cells < CELLS or o.cells % CELLS):
        raise UserError(
            f"--cells {o.cells}: it takes a multiple of {CELLS}, since a half and one and a half times as many are timed too"
        )
    if "input" in o.parts and o.images < o.batch:
        raise UserError(f"--images {o.images}: a batch alone has --batch {o.batch}, so it takes at least as many")
    if o.json and not pathlib.Path(o.json).absolute().parent.is_dir():
        raise UserError(f"--json {o.json}: there is no folder {pathlib.Path(o.json).parent}")
    cores = runtime.cores()
    if o.threads > cores:
        raise UserError(f"--threads {o.threads}: of the cores, this process may use {cores}")
    return dataclasses.replace(o, threads=o.threads or cores)


def _check_encoders(o):
    if not o.encoders:
        raise UserError(f"--encoders: it takes at least one of {', '.join(registry.names())}")
    for name in o.encoders:
        stride = registry.encoder(name).stride
        if o.size % stride:
            raise UserError(f"--size {o.size}: {name} takes a multiple of its stride, {stride}")
        if "step" in o.parts:
            if o.batch * (o.size // stride) ** 2 < 2:
                raise UserError(f"--batch {o.batch}: of one cell there is no batch norm, so it takes at least 2")
            for objective in _PAIRED:
                pretraining(o, name, objective)
    if o.peers:
        peers.need()


def supervised(o, name):
    """The config by which encoder `name` is trained as a classifier; of a ViT as released, for its twin's sake."""
    fields = {"objective": "supervised", "image_size": o.size, "head.classes": o.classes, **_common(o, name)}
    if "position" in registry.ENCODERS[name].options:
        grid = o.size // registry.encoder(name).stride
        fields |= {"encoder.class_token": True, "encoder.position": "learnt", "encoder.grid": grid}
    return config_lib.resolve(fields)


def pretraining(o, name, objective):
    """The config by which encoder `name` is pre-trained. Raises UserError where the objective does not take the size."""
    config = config_lib.resolve({"objective": objective, "image_size": o.pretrain_size, **_common(o, name)})
    try:
        methods.build(config)
    except UserError as error:
        raise UserError(f"--pretrain-size {o.pretrain_size}: {error}") from error
    return config


def _common(o, name):
    # As long as a run may be, so that the learning rate stays what it is.
    return {"encoder.name": name, "batch_size": o.batch, "dtype": o.dtype, "total_steps": 1_000_000}
