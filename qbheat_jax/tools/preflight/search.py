"""The largest batch that fits, with few compilations: doubling from the config's own, then bisecting."""

import logging

log = logging.getLogger("qbheat")


def largest(fits, start, step, close=1 / 8, most=12):
    """The largest multiple of `step` for which fits(n), to within the share `close` of it; 0 where none was found.

    `start`: a multiple of `step` to begin with. At most `most` calls; `fits` is taken to be true up to some n and false
    beyond it.

    >>> largest(lambda n: n <= 1000, 256, 8, close=0)
    1000
    """
    low, high, calls = 0, None, 0
    n = start
    while calls < most:
        calls += 1
        if fits(n):
            low = n
        else:
            high = n
        if high is None:
            n = 2 * low
            continue
        if high - low <= max(step, close * low):
            break
        # Downwards by halves until something fits.
        n = (low + high) // 2 // step * step if low else max(step, high // 2 // step * step)
    return low
