"""Settings of a process that must be made before jax starts: malloc, XLA flags, and absent accelerators."""

import ctypes
import glob
import logging
import os
import pathlib
import platform
import sys

GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
TUNABLES = "GLIBC_TUNABLES"

# Flags of XLA:GPU for the whole process.
# * No Triton matmuls: timing their tiles takes most of the compilation, and tile propagation aborts the process for some
#   programs (openxla/xla issue 47381). cuBLAS takes their place.
GPU_FLAGS = {"xla_gpu_enable_triton_gemm": "false"}


def vendors():
    """Return the set of PCI vendor ids in this machine; empty where /sys does not list them."""
    return {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}


def cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


MALLOC = {
    "hugetlb": 1,
    "mmap_threshold": 2**30,
    "trim_threshold": 2**32,
    "top_pad": 2**30,
    "arena_max": max(2, cores()),
}


def tune_malloc():
    """Re-execute this process, under the same process id, with the malloc settings of `MALLOC`.

    XLA:CPU frees a step's arrays at its end and allocates them again in the next. By default glibc returns them to the kernel,
    which clears each page of 4 KiB anew. With huge pages (2 MiB on x86) and freed memory kept by the process (up to 4 GiB, and
    single arrays up to 1 GiB) the quickstart trains a fifth to a third faster. glibc (2.35 and newer) reads
    GLIBC_TUNABLES at the start of a process alone, and mallopt(3) sets no huge pages.

    There is one heap for each core, where glibc allows eight: kept memory is lost to the other heaps, so that a long run grows
    with their number. A single heap on two cores would make steps take up to 1.6 times as long, for it then holds the remains
    of compilation too.

    Call this first in a program's entry point. It does nothing with an accelerator, with another C library, or where
    GLIBC_TUNABLES is set.
    """
    if TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or vendors() & {GOOGLE, NVIDIA, AMD}:
        return
    os.environ[TUNABLES] = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trim_heap():
    """Return free heap memory to the kernel, where `tune_malloc` made glibc keep it. Of no effect elsewhere.

    Checkpoints and evaluations leave free pieces between live arrays, and the heap grows for hours around them. A trim
    at each checkpoint bounds the resident memory; the next step faults its pages in again.
    """
    if platform.libc_ver()[0] == "glibc" and TUNABLES in os.environ:
        ctypes.CDLL(None).malloc_trim(0)


def expect_no_tpu():
    """Answer libtpu's questions about the machine, so that it logs nothing where it is installed and there is no TPU."""
    if GOOGLE in vendors():  # a Google device, perhaps a TPU
        return
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ):
        os.environ.setdefault(name, value)


def gpu_flags():
    """Return XLA_FLAGS with `GPU_FLAGS` added. The user's own flags win."""
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in given]
    return " ".join([given, *wanted]).strip()


def tune_gpu():
    """Set `GPU_FLAGS` where there is an NVIDIA GPU. Call it before jax starts."""
    if NVIDIA in vendors():
        os.environ["XLA_FLAGS"] = gpu_flags()


def expect_no_gpu():
    """Keep jax from logging a traceback where its CUDA plugin is installed, for its compiler, and there is no NVIDIA GPU.

    The plugin asks CUDA's driver for devices as jax starts. Without a driver jax goes on with the devices that exist. With an
    NVIDIA device or a driver, failures are logged as usual.
    """
    if NVIDIA not in vendors() and not _has_cuda_driver():
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_not_of_cuda_plugin)


def _is_not_of_cuda_plugin(record):
    return "jax_plugins.xla_cuda" not in record.getMessage()


def _has_cuda_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
