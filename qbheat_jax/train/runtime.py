"""What a process has to be told of the machine it runs on before it imports jax."""

import ctypes
import glob
import logging
import os
import pathlib
import platform
import sys

GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
TUNABLES = "GLIBC_TUNABLES"
MALLOC = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32}

# Flags for XLA:GPU, which has no other switch for a whole process, and the reason for each.
# * No matrix products by Triton: XLA times dozens of tiles for each of hundreds of products, which takes most of the time to
#   compile, and its propagation of tiles ends the process for some programs (openxla/xla issue 47381). cuBLAS has them instead.
GPU_FLAGS = {"xla_gpu_enable_triton_gemm": "false"}


def vendors():
    """The set of the PCI ids of those whose devices are in this machine; empty where there is no telling."""
    return {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tune_malloc():
    """Starts this process anew, under the same number, with glibc told how to give memory to arrays (`MALLOC`).

    XLA's CPU client frees the arrays of a step when it ends and asks for them again in the next. Left to itself glibc gives
    them back to the kernel, which clears every page of 4 KiB anew: a third of the time of a small model's step. So pages are
    large (2 MiB on x86), and what is freed stays with the process: up to 4 GiB, and single arrays of 1 GiB. Heaps stay many:
    with one alone, what compiling leaves in it makes each step of the same process take up to 1.6 times as long. glibc (2.35
    and newer) reads this when a process starts and never again. For the entry point of a program alone, which has done nothing
    yet. Of no effect with an accelerator, another C library, or where GLIBC_TUNABLES is set already.
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
    """Where libtpu is installed and there is no TPU it complains at length; told what it would ask the machine, it does not."""
    if GOOGLE in vendors():  # a device of Google's, which may be one
        return
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ):
        os.environ.setdefault(name, value)


def gpu_flags():
    """The value of XLA_FLAGS with what GPUs want, `GPU_FLAGS`. What the user has set stays as it is."""
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in given]
    return " ".join([given, *wanted]).strip()


def tune_gpu():
    """Set `GPU_FLAGS` where there is a GPU of NVIDIA's, before jax starts."""
    if NVIDIA in vendors():
        os.environ["XLA_FLAGS"] = gpu_flags()


def expect_no_gpu():
    """Keep jax from logging a traceback where its CUDA plugin is installed, for its compiler, and there is no NVIDIA GPU.

    The plugin asks CUDA's driver for its devices as jax starts. Without a driver that is no error here: jax goes on with
    the devices that there are. With an NVIDIA device or a driver, what fails is logged as ever.
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
