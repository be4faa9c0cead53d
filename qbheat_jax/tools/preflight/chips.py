"""The one table of what chips can do. Vendors' figures, per chip; 1 GB is 10^9 bytes, 1 GiB 2^30."""

import dataclasses

GB, KIB, MIB, GIB, TFLOP = 10**9, 2**10, 2**20, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's GPU compiler is told of a GPU besides the figures of `Chip`; `cores` are streaming multiprocessors.

    Args:
      name: As CUDA reports it.
      capability: CUDA's compute capability, (major, minor).
      fpus: float32 units a core.
      clock: GHz, boost.
      l2: Bytes.
      shared: Shared memory a core, bytes.
      shared_block: The largest part of it that one block can take, bytes.
      nvlinks: How many NVLink connections.
    """

    name: str
    capability: tuple
    cores: int
    fpus: int
    clock: float
    l2: int
    shared: int
    shared_block: int
    nvlinks: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    `flops`: peak of bfloat16 matrix products, operations a second. `hbm`: bytes; `hbm_bandwidth`: bytes a second.
    `links`: bytes a second that a chip can send to its neighbours over all its links at once; vendors count sending and
    receiving together, twice that. `devices`: how many JAX sees of one chip; each has an equal part of everything.
    `dimensions` of its torus, 0 where the chips are not joined in one; `most`: chips in the largest slice; `config`:
    libtpu's name of a chip whose cores work as one device, where that is not what it takes without being told.
    `gpu`: what the GPU compiler is told, None of a TPU.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    links: float
    devices: int = 1
    dimensions: int = 0
    most: int = 0
    config: str = ""
    gpu: Gpu | None = None

    @property
    def tpu(self):
        return self.dimensions > 0


CHIPS = {
    # docs.cloud.google.com/tpu/docs/v4; links: 6 of 50 GB/s each way, arXiv 2304.01433
    "v4": Chip(275 * TFLOP, 32 * GIB, 1200 * GB, 300 * GB, dimensions=3, most=4096, config="megacore"),
    # docs.cloud.google.com/tpu/docs/v5e: 400 GB/s both ways together
    "v5e": Chip(197 * TFLOP, 16 * GIB, 819 * GB, 200 * GB, dimensions=2, most=256),
    # docs.cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways together
    "v5p": Chip(459 * TFLOP, 95 * GIB, 2765 * GB, 600 * GB, dimensions=3, most=6144),
    # docs.cloud.google.com/tpu/docs/v6e: 800 GB/s both ways together
    "v6e": Chip(918 * TFLOP, 32 * GIB, 1638 * GB, 400 * GB, dimensions=2, most=256),
    # docs.cloud.google.com/tpu/docs/tpu7x: 1200 GB/s both ways together, two devices a chip
    "tpu7x": Chip(2307 * TFLOP, 192 * GIB, 7380 * GB, 600 * GB, devices=2, dimensions=3, most=9216),
    # NVIDIA's data sheets of the SXM modules, dense bfloat16; NVLink 600, 900 and 1800 GB/s both ways together. Memory as
    # CUDA reports it, and the rest, from XLA's own descriptions: openxla/xla, xla/backends/gpu/target_config/specs.
    "a100": Chip(
        312 * TFLOP, 85100068864, 2039 * GB, 300 * GB,
        gpu=Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 163 * KIB, 12),
    ),
    "h100": Chip(
        989 * TFLOP, 84942979072, 3352 * GB, 450 * GB,
        gpu=Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB, 18),
    ),
    "h200": Chip(
        989 * TFLOP, 151397597184, 4800 * GB, 450 * GB,
        gpu=Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB, 18),
    ),
    "b200": Chip(
        2250 * TFLOP, 191514411008, 7672 * GB, 900 * GB,
        gpu=Gpu("NVIDIA B200", (10, 0), 148, 128, 1.965, 132644864, 228 * KIB, 227 * KIB, 18),
    ),
}  # fmt: skip

NODE = 8  # GPUs joined by NVLink
