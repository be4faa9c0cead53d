"""Run the campaign: `bash launch/campaign.sh [--minutes N] [PART ...]`. It prints each try and a table at the end."""

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign import faults, inputs, kills, soak

# Each part's fraction of the minutes, about the time that it takes on two cores.
FRACTIONS = {"inputs": 0.05, "devices": 0.03, "disks": 0.1, "damage": 0.22, "kills": 0.4, "soak": 0.2}
PARTS = """parts:
  inputs   malformed images, folders, annotations, weights, checkpoints, configs and command lines (--inputs)
  devices  a run that is killed and resumed with 8, 4, 1 and 8 virtual devices
  disks    12 runs on a disk that fills up or becomes read-only (needs root and mount; skipped without them)
  damage   each file of the newest checkpoint, metrics.jsonl and config.json truncated, bit-flipped, emptied or removed
  kills    SIGKILLs and SIGTERMs at random moments, in runs of one and of two processes (--kills, --terms)
  soak     one long run, whose memory must stay flat

Each part has a fraction of the minutes and stops when it is used up. Exit code 1 means that a try failed.
Example: bash launch/campaign.sh --minutes 10 inputs kills"""


class Tally:
    """Counts of tries and failures.

    Call it after each try with the kind of fault, a description of the try, and the failure as text, or None.

    Attributes:
      tries: {kind: number of tries}.
      misses: {kind: number of failures}.
      notes: {kind: [text, ...]} for the lines below the table.
    """

    def __init__(self):
        self.tries, self.misses, self.notes = (
            collections.Counter(),
            collections.Counter(),
            collections.defaultdict(list),
        )

    def __call__(self, kind, what, wrong):
        self.tries[kind] += 1
        self.misses[kind] += wrong is not None
        if wrong is not None or kind == "soak":
            self.notes[kind].append(f"{what}: {wrong}" if wrong else what)
        print(f"{time.strftime('%H:%M:%S')} {kind}: {what}: {wrong or 'ok'}", flush=True)

    def table(self):
        """Return the Markdown table of passed tries, followed by the notes."""
        lines = ["| what | held | of |", "|---|---|---|"]
        for kind, count in self.tries.items():
            lines.append(f"| {kind} | {count - self.misses[kind]} | {count} |")
        lines += [f"\n{kind}: {'; '.join(words)}" for kind, words in self.notes.items()]
        return "\n".join(lines)


def main(argv=None):
    """Run the chosen parts. Return the exit code: 1 if any try failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="campaign",
        description="Test that training survives faults, and that commands reject bad input with a one-line error.",
        epilog=PARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run, see below (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=100, metavar="N", help="approximate time of all parts (default: 100)"
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="number of SIGKILLs (default: 100)")
    parser.add_argument("--terms", type=int, default=20, metavar="N", help="number of SIGTERMs (default: 20)")
    parser.add_argument(
        "--inputs", type=int, default=250, metavar="N", help="number of malformed inputs (default: 250)"
    )
    arguments = parser.parse_args(argv)
    parts = arguments.parts or list(FRACTIONS)
    if unknown := [part for part in parts if part not in FRACTIONS]:
        parser.error(f"PART {unknown[0]!r} is not accepted; it takes {', '.join(FRACTIONS)}")
    tally, begin = Tally(), time.monotonic()
    total = sum(FRACTIONS[part] for part in parts)
    seconds = {part: 60 * arguments.minutes * FRACTIONS[part] / total for part in parts}
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
