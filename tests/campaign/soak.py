"""A day's training in small: steps, evaluations and checkpoints for minutes on end, and memory that stays flat."""

import time

from tests.campaign import runs

# How much the floor of the last quarter may lie above that of the second, or below. The floor is the lowest tenth: between
# two collections of Python's garbage the memory of checkpoints comes and goes, by a tenth of the whole.
GROWTH, FLOOR = 0.02, 0.1


def run(place, minutes, report):
    """Train for so many minutes. report(kind, what, wrong)."""
    run = runs.Run(place, "soak", steps=10**6)
    run.start()
    end, sizes = time.monotonic() + 60 * minutes, []
    while run.running() and time.monotonic() < end:
        time.sleep(1)
        sizes.append(_resident(run.children[0].pid))
    early = not run.running()
    run.kill()
    steps = run.lines()
    quarter = len(sizes) // 4
    parts = [sorted(part) or [1] for part in (sizes[quarter : 2 * quarter], sizes[-quarter:])]
    before, after = (part[int(FLOOR * len(part))] for part in parts)
    growth = after / before - 1
    what = f"{minutes:g} minutes, some {steps} steps: {before / 2**20:,.0f} -> {after / 2**20:,.0f} MiB, {growth:+.1%}"
    highest = max(size for part in parts for size in part)
    what += f"; at most {highest / 2**20:,.0f} MiB"
    wrong = "it ended early" if early else f"memory grew by {growth:.1%}" if abs(growth) > GROWTH else None
    if wrong:
        print(f"--- {wrong}\n{run.log()[-3000:]}", flush=True)
    report("soak", what, wrong)
    run.remove()


def _resident(pid):
    """Bytes of memory that a process holds."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0
