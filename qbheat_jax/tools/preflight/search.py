"""Search for the largest batch that fits with few compilations, by doubling and then bisection."""

import logging

log = logging.getLogger("qbheat")


def largest(fits, start, step, tolerance=1 / 8, max_calls=12):
    """Find the largest multiple of `step` that fits.

    Args:
      fits: Function of an int that is true up to some number and false above it.
      start: First number to try, a multiple of `step`.
      step: int.
      tolerance: Accepted relative distance from the optimum.
      max_calls: Limit on the calls of `fits`.

    Returns:
      The largest number found to fit, or 0 if none fits.

    >>> largest(lambda n: n <= 1000, 256, 8, tolerance=0)
    1000
    """
    low, high, calls = 0, None, 0
    n = start
    while calls < max_calls:
        calls += 1
        if fits(n):
            low = n
        else:
            high = n
        if high is None:
            n = 2 * low
            continue
        if high - low <= max(step, tolerance * low):
            break
        # Halve until something fits, then bisect.
        n = (low + high) // 2 // step * step if low else max(step, high // 2 // step * step)
    return low
