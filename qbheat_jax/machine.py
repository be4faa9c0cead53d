"""What a process has to be told of the machine it runs on before it imports jax."""

import glob
import os
import pathlib
import platform
import sys

GOOGLE, NVIDIA, AMD = "0x1ae0", "0x10de", "0x1002"
TUNABLES = "GLIBC_TUNABLES"


def vendors():
    """The set of the PCI ids of those whose devices are in this machine; empty where there is no telling."""
    return {pathlib.Path(path).read_text().strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor")}


def take_large_pages():
    """Starts this process anew, under the same number, with glibc told to ask the kernel for large pages (2 MiB on x86).

    XLA's CPU client frees the arrays of a step when it ends and asks for them again in the next, and the kernel clears every
    page anew: of 4 KiB each that is a quarter of the time of a small model's step. glibc (2.35 and newer) reads this choice
    when a process starts and never again. For the entry point of a program alone, which has done nothing yet. Of no effect
    with an accelerator, another C library, or where GLIBC_TUNABLES is set already.
    """
    if TUNABLES in os.environ or platform.libc_ver()[0] != "glibc" or vendors() & {GOOGLE, NVIDIA, AMD}:
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
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
