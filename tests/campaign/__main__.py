"""Run the campaign: `bash launch/campaign.sh [--minutes N] [PART ...]`."""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign import faults, inputs, kills, soak

# Each part's share of the minutes, about what it takes on two cores.
SHARES = {"inputs": 0.05, "devices": 0.03, "disks": 0.1, "damage": 0.22, "kills": 0.4, "soak": 0.2}


class Tally:
    """What was tried, and what went wrong: {kind: {what: [tries, misses]}}."""

    def __init__(self):
        self.tries, self.misses, self.about = (
            collections.Counter(),
            collections.Counter(),
            collections.defaultdict(list),
        )

    def __call__(self, kind, what, wrong):
        self.tries[kind] += 1
        self.misses[kind] += wrong is not None
        if wrong is not None or kind == "soak":
            self.about[kind].append(f"{what}: {wrong}" if wrong else what)
        print(f"{time.strftime('%H:%M:%S')} {kind}: {what}: {wrong or 'ok'}", flush=True)

    def table(self):
        lines = ["| what | held | of |", "|---|---|---|"]
        for kind, count in self.tries.items():
            lines.append(f"| {kind} | {count - self.misses[kind]} | {count} |")
        lines += [f"\n{kind}: {'; '.join(words)}" for kind, words in self.about.items()]
        return "\n".join(lines)


def main(argv=None):
    """Run the parts that are named -> exit code, 1 where anything went wrong."""
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SHARES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=100, help="how long it may take, about (default: 100)")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs (default: 100)")
    parser.add_argument("--terms", type=int, default=20, help="SIGTERMs (default: 20)")
    parser.add_argument("--inputs", type=int, default=250, help="malformed inputs (default: 250)")
    arguments = parser.parse_args(argv)
    parts = arguments.parts or list(SHARES)
    if unknown := [part for part in parts if part not in SHARES]:
        parser.error(f"there is no part {unknown[0]!r}: {', '.join(SHARES)}")
    tally, begin = Tally(), time.monotonic()
    seconds = {part: 60 * arguments.minutes * SHARES[part] / sum(SHARES[p] for p in parts) for part in parts}
    with tempfile.TemporaryDirectory(prefix="campaign-") as place:
        place = Path(place)
        for part in parts:
            until = time.monotonic() + seconds[part]
            if part == "inputs":
                inputs.run(place, arguments.inputs, until, tally)
            elif part == "kills":
                kills.run(place, arguments.kills, arguments.terms, until, tally)
            elif part == "soak":
                soak.run(place, seconds[part] / 60, tally)
            else:
                getattr(faults, part)(place, until, tally)
    print(f"\n{tally.table()}\n\n{(time.monotonic() - begin) / 60:.0f} minutes", flush=True)
    return int(bool(+tally.misses))


if __name__ == "__main__":
    sys.exit(main())
