"""The one table of what chips can do. Vendors' figures, per chip; 1 GB is 10^9 bytes, 1 GiB 2^30."""

import dataclasses

GB, GIB, TFLOP = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    `flops`: peak of bfloat16 matrix products, operations a second. `hbm`: bytes; `hbm_bandwidth`: bytes a second.
    `links`: bytes a second that a chip can send to its neighbours over all its links at once; vendors count sending and
    receiving together, twice that. `devices`: how many JAX sees of one chip; each has an equal part of everything.
    `dimensions` of its torus, 0 where the chips are not joined in one; `most`: chips in the largest slice; `config`:
    libtpu's name of a chip whose cores work as one device, where that is not what it takes without being told.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    links: float
    devices: int = 1
    dimensions: int = 0
    most: int = 0
    config: str = ""

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
    # NVIDIA's data sheets of the SXM modules, dense bfloat16; NVLink 600 and 900 GB/s both ways together
    "a100": Chip(312 * TFLOP, 80 * GB, 2039 * GB, 300 * GB),
    "h100": Chip(989 * TFLOP, 80 * GB, 3350 * GB, 450 * GB),
    "h200": Chip(989 * TFLOP, 141 * GB, 4800 * GB, 450 * GB),
}
