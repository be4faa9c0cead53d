"""A long run with many evaluations and checkpoints, whose memory must stay flat."""

import time

from tests.campaign import runs

# Accepted relative difference between the memory floors of the last and the second quarter, and the quantile of the floor.
# The floor is a low quantile because checkpoints raise the memory by a tenth until Python's next garbage collection.
GROWTH, FLOOR = 0.02, 0.1


def run(place, minutes, report):
    """Train for a while and check the memory.

    Args:
      place: `Path` of a folder for the run.
      minutes: Length of the run.
      report: Function (kind, what, wrong) that is called at the end, such as a `Tally`.
    """
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
    what = f"{minutes:g} minutes, about {steps} steps: {before / 2**20:,.0f} -> {after / 2**20:,.0f} MiB, {growth:+.1%}"
    highest = max(size for part in parts for size in part)
    what += f"; at most {highest / 2**20:,.0f} MiB"
    wrong = "it ended early" if early else f"memory changed by {growth:+.1%}" if abs(growth) > GROWTH else None
    if wrong:
        print(f"--- {wrong}\n{run.log()[-3000:]}", flush=True)
    report("soak", what, wrong)
    run.remove()


def _resident(pid):
    """Return the resident memory of a process in bytes; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0
