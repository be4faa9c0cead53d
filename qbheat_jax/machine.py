"""What a process has to be told of the machine it runs on before it imports jax."""

import glob
import os
import pathlib
import platform
import sys

GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
TUNABLES = "GLIBC_TUNABLES"
GIB = 2**30


def vendors():
    """The set of the PCI ids of those whose devices are in this machine; empty where there is no telling."""
    return {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}


def memory():
    """Bytes of memory that this process may have: the machine's, or less where a control group (a container) allows less."""
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed if allowed == "max" else min(installed, int(allowed))


def malloc_options():
    """What glibc is told, as {name: value}: pages are large (2 MiB on x86), and what is freed stays with the process, in one heap.

    Single arrays of up to an eighth of the memory stay too, between 1 and 8 GiB: a step's buffer is one array, and cleared pages
    for it take a seventh of the step. Not larger ones, since of each the heap may come to hold a second or third that lies between
    other arrays, where nothing fits.
    """
    kept = min(max(memory() // 8, GIB), 8 * GIB)
    return {"hugetlb": 1, "mmap_threshold": kept, "trim_threshold": max(4 * GIB, 2 * kept), "arena_max": 1}


def tune_malloc():
    """Starts this process anew, under the same number, with glibc told how to give memory to arrays (`malloc_options`).

    XLA's CPU client frees the arrays of a step when it ends and asks for them again in the next. Left to itself glibc gives
    them back to the kernel, which clears every page of 4 KiB anew: a third of the time of a small model's step. glibc (2.35 and
    newer) reads its options when a process starts and never again. For the entry point of a program alone, which has done
    nothing yet. Of no effect with an accelerator, another C library, or where GLIBC_TUNABLES is set already.
    """
    if TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or vendors() & {GOOGLE, NVIDIA, AMD}:
        return
    os.environ[TUNABLES] = ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc_options().items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
