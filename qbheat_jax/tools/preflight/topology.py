"""Parse names of topologies such as "v5e:4x4", and give their devices, which need not be present."""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import math
import os
import re

import jax

from qbheat_jax.errors import UserError, unknown
from qbheat_jax.tools.preflight.chips import CHIPS, NODE, Chip

log = logging.getLogger("qbheat")

# Kinds without an entry in CHIPS: this machine's CPUs, and GPUs of an unknown model.
HOSTS = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Topology:
    """The target devices of a program.

    Attributes:
      name: Such as "v5e:4x4".
      kind: Part of the name before the colon.
      shape: Tuple of ints: sides of the slice, or the number of devices.
      chip: A `chips.Chip`; None for plain "cpu" and "gpu".
    """

    name: str
    kind: str
    shape: tuple
    chip: Chip | None

    @property
    def chips(self):
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self):
        """The number of JAX devices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def tpu(self):
        """Whether it is a TPU."""
        return self.chip is not None and self.chip.tpu

    @property
    def gpu(self):
        """Whether it is a GPU model that XLA can compile for, such as "h100" but not plain "gpu"."""
        return self.chip is not None and self.chip.gpu is not None


def parse(name):
    """Parse the name of a topology.

    Args:
      name: Such as "v5e:4x4", "h100:8" or "cpu:8".

    Returns:
      The `Topology`.

    Raises:
      UserError: The name is not accepted.

    >>> parse("v5e:4x4").chips
    16
    """
    kind, _, text = name.partition(":")
    kinds = (*CHIPS, *HOSTS)
    if kind not in kinds:
        raise unknown(f"--topology {name}: {kind!r}", kind, kinds)
    chip = CHIPS.get(kind)
    dimensions = chip.dimensions if chip and chip.tpu else 1
    example = {1: f"{kind}:8", 2: f"{kind}:4x4", 3: f"{kind}:4x4x8"}[dimensions]
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", text) or len(text.split("x")) != dimensions:
        sides = "a number of devices" if dimensions == 1 else f"{dimensions} side lengths"
        raise UserError(f"--topology {name} is not accepted; {kind} takes {sides}, such as {example}")
    shape = tuple(int(n) for n in text.split("x"))
    if chip and chip.gpu and shape[0] > NODE and shape[0] % NODE:
        raise UserError(
            f"--topology {name} is not accepted; more than {NODE} GPUs must fill nodes of {NODE}, such as {kind}:{2 * NODE}"
        )
    if dimensions > 1 and math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise UserError(
            f"--topology {name} is not accepted; boards have 2 x 2 chips, so the first two sides must be even, such as "
            f"{example}"
        )
    if dimensions > 1 and math.prod(shape) > chip.max_chips:
        raise UserError(
            f"--topology {name} has {math.prod(shape)} chips, but a slice of {kind} has at most {chip.max_chips}; use a "
            f"smaller one, such as {example}"
        )
    return Topology(name, kind, shape, chip)


def prepare(topology):
    """Restrict JAX to this machine's CPUs, before it initialises its backends.

    For "cpu" and "gpu", JAX then makes as many CPU devices as the topology has. If the backends are already initialised,
    nothing changes.

    Args:
      topology: A `Topology`.

    Raises:
      UserError: The compiler of this topology is not installed.
    """
    if topology.tpu and not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise UserError(
            f"--topology {topology.name} needs the TPU compiler libtpu, which is not installed: pip install "
            "'qbheat_jax[tpu]' (on Linux; no TPU is needed)"
        )
    if topology.gpu and not gpu_compiler():
        raise UserError(
            f"--topology {topology.name} needs XLA's GPU compiler (package jax-cuda13-pjrt), which is not installed: "
            "pip install 'qbheat_jax[gpu-compiler]' (on Linux; no GPU is needed)"
        )
    # libtpu queries the TPU host for these values and complains on other machines. Its lock on the TPU is not needed,
    # since no TPU is used: two preflights may run at once.
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
        if not (topology.tpu or topology.gpu) and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", topology.devices)
    except RuntimeError:
        log.debug("JAX has already initialised its backends")


def gpu_compiler():
    """Return the installed package of XLA's GPU compiler as "name version", or "" if none is installed."""
    return installed("jax-cuda13-pjrt", "jax-cuda12-pjrt")


def installed(*packages):
    """Return the first installed one of `packages` as "name version", or "" if none is installed."""
    for package in packages:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def describe(chip):
    """Return a GPU's description for XLA's compiler: stream_executor.GpuTargetConfigProto as text.

    Accelerated features are instructions of a single GPU generation, such as Hopper's warp-group matmuls. As on a real
    GPU, they are on from compute capability 9.
    """
    gpu, (major, minor) = chip.gpu, chip.gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_block}
  shared_memory_per_core: {gpu.shared}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.l2}
  device_memory_size: {chip.hbm}
  memory_bandwidth: {chip.hbm_bandwidth}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {"ACCELERATED_FEATURES" if major >= 9 else "NONE"}
  }}
  device_interconnect_info {{ active_links: {gpu.nvlinks} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def devices(topology):
    """Return the devices to compile for. TPUs and GPUs need not be present.

    Args:
      topology: A `Topology`. More than `chips.NODE` GPUs form several nodes of one process each.

    Returns:
      List of devices.

    Raises:
      UserError: This process has too few CPU devices, or the compiler does not accept the topology.
    """
    if topology.gpu:
        nodes = -(-topology.devices // NODE)
        shape = f"1x{nodes}x{topology.devices // nodes}"
        return _described(topology.name, "cuda", target_config=describe(topology.chip), topology=shape)
    if not topology.tpu:
        here = jax.devices("cpu")
        if len(here) < topology.devices:
            raise UserError(
                f"--topology {topology.name}: this process has only {len(here)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}"
            )
        return here[: topology.devices]
    options = {"chip_config_name": topology.chip.config} if topology.chip.config else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return _described(topology.name, "tpu", **options)


def _described(name, platform, **options):
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform=platform, **options).devices
    except Exception as error:  # each compiler raises its own types
        compiler = "libtpu" if platform == "tpu" else "XLA's GPU compiler"
        words = str(error).splitlines()[0]
        raise UserError(f"--topology {name} is not accepted by {compiler}: {words}") from error
