"""SIGKILL and SIGTERM at random moments of runs with one or two processes, with and without decoding processes."""

import os
import shutil
import signal
import time

from tests.campaign import runs

# (name, arguments of `runs.Run`, fraction of the signals).
VARIANTS = (
    ("one process", {}, 0.6),
    ("two processes", {"processes": 2}, 0.4),
)
# Signals to one workdir before its run may end.
_EACH = 4


def run(place, kills, terms, until, report):
    """Send signals to runs and check that they resume.

    Args:
      place: `Path` of a folder for the runs.
      kills: Number of SIGKILLs.
      terms: Number of SIGTERMs.
      until: Time of `time.monotonic` at which to stop.
      report: Function (kind, variant, wrong) that is called after each signal, such as a `Tally`.
    """
    for name, how, share in VARIANTS:
        hits = [signal.SIGKILL] * round(kills * share) + [signal.SIGTERM] * round(terms * share)
        draw = runs.seeded("kills", name)
        draw.shuffle(hits)
        whole = runs.expected(place, **how)
        while hits and time.monotonic() < until:
            batch, hits = hits[:_EACH], hits[_EACH:]
            _one(place, name, how, batch, whole, draw, report)


def _one(place, name, how, hits, whole, draw, report):
    """Signal and restart one run several times, then let it end. Its loss curve must equal the uninterrupted one."""
    run, done, wrong = runs.Run(place, "hit", **how), [], None
    for number in hits:
        while True:
            run.start()
            if run.until_random(draw):
                break
            codes = run.wait()
            if any(codes):
                wrong = wrong or f"it ended with exit codes {codes} before the signal"
                break
            shutil.rmtree(run.workdir)  # the run ended before the signal, so start it again
            done.clear()
        done.append(number)
        target = run.children[draw.randrange(len(run.children))]
        if number == signal.SIGTERM:
            for child in run.children:
                child.terminate()
            codes = run.wait(60)
            # Before the first step there is nothing to save, and SIGTERM ends the process by default.
            if any(code not in (143, -signal.SIGTERM, 0) for code in codes):
                wrong = wrong or f"SIGTERM ended it with exit codes {codes}"
        else:
            os.kill(target.pid, signal.SIGKILL)
            target.wait()
            run.kill()  # kill the other processes and the decoders too, as a scheduler does
    run.start()
    codes = run.wait()
    if any(codes):
        wrong = wrong or f"after its restart it ended with exit codes {codes}"
    else:
        try:
            wrong = wrong or runs.differs(run.curve(), whole)
        except (OSError, ValueError) as error:
            wrong = wrong or str(error)
    if "Traceback" in run.log():
        wrong = wrong or "a traceback was printed"
    if wrong:
        print(f"--- {name}: {wrong}\n{run.log()[-3000:]}", flush=True)
    for number in hits:
        report(signal.Signals(number).name, name, wrong)
    run.remove()
