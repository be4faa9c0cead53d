"""Options of a benchmark and their checks, which run before any compilation."""

import dataclasses
import math
import pathlib

from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.tools.bench import peers
from qbheat_jax.train import config_tables, runtime

PARTS = ("forward", "step", "heat", "input")
PEERS = ("eager", "channels-last", "compile")
_PAIRED = ("qbheat", "simmim")
# --cells must be a multiple of this: grids of 0.5, 1 and 1.5 times --cells are timed, and each needs a multiple of 4.
CELLS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `qbheat bench`, see its --help.

    Attributes:
      what: One of `PARTS`, or "all".
      classes: Classes of the classifiers; the only option without a flag.
      threads: Number of threads; 0 for all cores that this process may use.
    """

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
        """Tuple of the parts to run."""
        return PARTS if self.what == "all" else (self.what,)


def check(options):
    """Check options.

    Args:
      options: An `Options`.

    Returns:
      The `Options`, with 0 threads replaced by the number of cores.

    Raises:
      UserError: An option is not accepted.
    """
    o = options
    if o.what not in (*PARTS, "all"):
        raise UserError(f"bench {o.what} is not accepted; it takes {', '.join(PARTS)} or all")
    for name, minimum in (
        ("batch", 1), ("size", 1), ("pretrain_size", 1), ("heat_batch", 1), ("width", 1), ("images", 1), ("rounds", 1),
        ("seconds", 0), ("limit", 0), ("threads", 0),
    ):  # fmt: skip
        value = getattr(o, name)
        if not (math.isfinite(value) and value >= minimum):
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not accepted; it takes a number of at least {minimum}"
            )
    if o.dtype not in registry.DTYPES:
        raise UserError(f"--dtype {o.dtype} is not accepted; it takes {' or '.join(registry.DTYPES)}")
    wrong = [name for name in o.peers if name not in PEERS]
    if wrong:
        raise UserError(f"--peers {wrong[0]} is not accepted; it takes none, or some of {', '.join(PEERS)}")
    if {"forward", "step"} & set(o.parts):
        _check_encoders(o)
    if "heat" in o.parts and (o.cells < CELLS or o.cells % CELLS):
        raise UserError(
            f"--cells {o.cells} is not accepted; it takes a multiple of {CELLS}, since 0.5 and 1.5 times as many are timed too"
        )
    if "input" in o.parts and o.images < o.batch:
        raise UserError(f"--images {o.images} is not accepted; it takes at least one batch, --batch {o.batch}")
    if o.json and not pathlib.Path(o.json).absolute().parent.is_dir():
        raise UserError(f"--json {o.json} is not accepted; the folder {pathlib.Path(o.json).parent} does not exist")
    cores = runtime.cores()
    if o.threads > cores:
        raise UserError(f"--threads {o.threads} is not accepted; this process may use at most {cores} cores")
    return dataclasses.replace(o, threads=o.threads or cores)


def _check_encoders(o):
    if not o.encoders:
        raise UserError(f"--encoders is empty; it takes at least one of {', '.join(registry.names())}")
    for name in o.encoders:
        if registry.takes_clips(name):
            raise UserError(f"--encoders {name} is not accepted; it takes clips, and bench measures encoders of images")
        encoder = registry.encoder(name)
        stride = encoder.stride
        if o.peers and not peers.exists(encoder):
            raise UserError(f"--encoders {name} is not accepted with --peers; it has no counterpart: pass --peers none")
        if o.size % stride:
            raise UserError(f"--size {o.size} is not accepted; {name} takes a multiple of its stride, {stride}")
        if "step" in o.parts:
            if o.batch * (o.size // stride) ** 2 < 2:
                raise UserError(
                    f"--batch {o.batch} is not accepted; batch norm needs more than one cell, so at least 2"
                )
            for objective in _PAIRED:
                pretraining(o, name, objective)
    if o.peers:
        peers.need()


def supervised(o, name):
    """Return the config that trains encoder `name` as a classifier. A ViT gets its released form, as in PyTorch."""
    fields = {"objective": "supervised", "image_size": o.size, "head.classes": o.classes, **_common(o, name)}
    if "position" in registry.ENCODERS[name].options:
        grid = o.size // registry.encoder(name).stride
        fields |= {"encoder.class_token": True, "encoder.position": "learnt", "encoder.grid": grid}
    return config_tables.resolve(fields)


def pretraining(o, name, objective):
    """Return the config that pre-trains encoder `name`. Raise UserError if the method does not accept the size."""
    config = config_tables.resolve({"objective": objective, "image_size": o.pretrain_size, **_common(o, name)})
    try:
        methods.build(config)
    except UserError as error:
        raise UserError(f"--pretrain-size {o.pretrain_size}: {error}") from error
    return config


def _common(o, name):
    # A long run keeps the learning rate constant during the benchmark.
    return {"encoder.name": name, "batch_size": o.batch, "dtype": o.dtype, "total_steps": 1_000_000}
