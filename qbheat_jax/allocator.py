"""Large pages for the arrays of programs that XLA runs on the CPU."""

import os
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"


def take_large_pages():
    """Starts this process anew, under the same number, with glibc told to ask the kernel for large pages (2 MiB on x86).

    XLA's CPU client frees the arrays of a step when it ends and asks for them again in the next, and the kernel clears every
    page anew: of 4 KiB each that is a quarter of the time of a small model's step. glibc (2.35 and newer) reads this choice
    when a process starts and never again. To be called first thing, and only by the entry point of a program. Of no effect
    with another C library, where GLIBC_TUNABLES is set already, or where the kernel has no such pages to give.
    """
    if platform.libc_ver()[0] == "glibc" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
