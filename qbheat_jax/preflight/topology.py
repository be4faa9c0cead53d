"""Where a program is to run: "v5e:4x4" read and checked, and its devices, which need not be there."""

import dataclasses
import difflib
import importlib.util
import logging
import math
import os
import re

import jax

from qbheat_jax.errors import UserError
from qbheat_jax.preflight.chips import CHIPS, Chip

log = logging.getLogger("qbheat")

# Of these nothing is known but what JAX itself says.
HOSTS = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Topology:
    """`chip` is None of a plain "cpu" or "gpu"."""

    name: str
    kind: str
    shape: tuple
    chip: Chip | None

    @property
    def chips(self):
        return math.prod(self.shape)

    @property
    def devices(self):
        """How many JAX sees."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def tpu(self):
        return self.chip is not None and self.chip.tpu


def parse(name):
    """"v5e:4x4", "h100:8" or "cpu:8" -> Topology. Raises UserError, saying what would be accepted.

    >>> parse("v5e:4x4").chips
    16
    """
    kind, _, text = name.partition(":")
    kinds = (*CHIPS, *HOSTS)
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, 1, 0.0)[0]
        raise UserError(f"--topology {name}: {kind!r} is unknown, the nearest is {near}; known are {', '.join(kinds)}")
    chip = CHIPS.get(kind)
    dimensions = chip.dimensions if chip and chip.tpu else 1
    example = {1: f"{kind}:8", 2: f"{kind}:4x4", 3: f"{kind}:4x4x8"}[dimensions]
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", text) or len(text.split("x")) != dimensions:
        sides = "a number of devices" if dimensions == 1 else f"{dimensions} sides"
        raise UserError(f"--topology {name}: {kind} takes {sides}, such as {example}")
    shape = tuple(int(n) for n in text.split("x"))
    if dimensions > 1 and math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise UserError(
            f"--topology {name}: chips come in boards of 2 x 2, so the first two sides are even, such as {example}"
        )
    if dimensions > 1 and math.prod(shape) > chip.most:
        raise UserError(
            f"--topology {name} has {math.prod(shape)} chips, but no slice of {kind} has more than {chip.most}: take a "
            f"smaller one, such as {example}"
        )
    return Topology(name, kind, shape, chip)


def prepare(topology):
    """Before JAX looks for devices: it is to look for none but this machine's CPUs, as many as are asked for.

    Nothing is changed where it has looked already. Raises UserError where a compiler is missing.
    """
    if topology.tpu and not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise UserError(
            f"--topology {topology.name} needs the TPU's compiler, libtpu, which is not installed: pip install "
            "'qbheat_jax[tpu]' (on Linux; no TPU is needed)"
        )
    # What libtpu would ask of a TPU's host, and complains of elsewhere. Its lock keeps two processes off one TPU, which
    # is not used here: two preflights may run at once.
    for variable, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    try:
        jax.config.update("jax_platforms", "cpu")
        if not topology.tpu and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", topology.devices)
    except RuntimeError:
        log.debug("JAX has its devices already")


def devices(topology):
    """The devices to compile for; those of a TPU or GPU need not be here. Raises UserError where there are none."""
    if not topology.tpu:
        here = jax.devices("cpu")
        if len(here) < topology.devices:
            raise UserError(
                f"--topology {topology.name}: this process has {len(here)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}"
            )
        return here[: topology.devices]
    from jax.experimental import topologies

    options = {"chip_config_name": topology.chip.config} if topology.chip.config else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:  # libtpu's own words for what it does not make
        words = str(error).splitlines()[0]
        raise UserError(f"--topology {topology.name} is not accepted by libtpu: {words}") from error
