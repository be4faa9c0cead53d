"""Memory that the C library keeps between steps, for programs that XLA runs on the CPU."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_pages():
    """Tells glibc to keep what it has had from the kernel. Call it before numpy, jax or TensorFlow start threads.

    XLA's CPU client frees the arrays of a step when it ends, and asks for them again in the next. glibc gives large arrays
    straight back to the kernel, which then clears every page anew: a quarter of the time of a small model's step. One arena
    serves all threads, as only the first one can hold arrays this large; with few threads they do not wait for each other.

    Of no effect with another C library. On a machine with an accelerator the arrays are not in this memory, and the many
    threads of its input pipeline are better served by an arena each: do not call it there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        mallopt(option, value)
