"""Table of chips and their peak rates, per chip, from the vendors. 1 GB is 10^9 bytes, 1 GiB is 2^30 bytes."""

import dataclasses

GB, KIB, MIB, GIB, TFLOP = 10**9, 2**10, 2**20, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that XLA's compiler needs besides those of `Chip`.

    Attributes:
      name: Device name that CUDA reports.
      capability: CUDA compute capability, (major, minor).
      cores: Number of streaming multiprocessors.
      fpus: float32 units per core.
      clock: Boost clock in GHz.
      l2: L2 cache in bytes.
      shared: Shared memory per core in bytes.
      shared_block: Largest shared memory of one block in bytes.
      nvlinks: Number of NVLink connections.
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

    Attributes:
      flops: Peak rate of bfloat16 matmuls, operations per second.
      hbm: HBM in bytes.
      hbm_bandwidth: Bytes per second.
      links: Bytes per second that a chip can send over all its links at once. Vendors quote both directions together,
        which is twice that.
      devices: Number of JAX devices of one chip, each with an equal part of it.
      dimensions: Dimensions of the torus that joins the chips; 0 for no torus.
      max_chips: Chips of the largest slice.
      config: libtpu's name of the configuration in which the cores act as one device, if that is not its default.
      gpu: Properties for the GPU compiler; None for a TPU.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    links: float
    devices: int = 1
    dimensions: int = 0
    max_chips: int = 0
    config: str = ""
    gpu: Gpu | None = None

    @property
    def tpu(self):
        """Whether it is a TPU."""
        return self.dimensions > 0


CHIPS = {
    # docs.cloud.google.com/tpu/docs/v4; 6 links of 50 GB/s in each direction, arXiv 2304.01433
    "v4": Chip(275 * TFLOP, 32 * GIB, 1200 * GB, 300 * GB, dimensions=3, max_chips=4096, config="megacore"),
    # docs.cloud.google.com/tpu/docs/v5e; 400 GB/s in both directions together
    "v5e": Chip(197 * TFLOP, 16 * GIB, 819 * GB, 200 * GB, dimensions=2, max_chips=256),
    # docs.cloud.google.com/tpu/docs/v5p; 1200 GB/s in both directions together
    "v5p": Chip(459 * TFLOP, 95 * GIB, 2765 * GB, 600 * GB, dimensions=3, max_chips=6144),
    # docs.cloud.google.com/tpu/docs/v6e; 800 GB/s in both directions together
    "v6e": Chip(918 * TFLOP, 32 * GIB, 1638 * GB, 400 * GB, dimensions=2, max_chips=256),
    # docs.cloud.google.com/tpu/docs/tpu7x; 1200 GB/s in both directions together, two devices per chip
    "tpu7x": Chip(2307 * TFLOP, 192 * GIB, 7380 * GB, 600 * GB, devices=2, dimensions=3, max_chips=9216),
    # NVIDIA's data sheets of the SXM modules: dense bfloat16; NVLink 600, 900 and 1800 GB/s in both directions together.
    # Memory (as CUDA reports it) and the rest come from XLA: openxla/xla, xla/backends/gpu/target_config/specs.
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

NODE = 8  # GPUs that NVLink joins
