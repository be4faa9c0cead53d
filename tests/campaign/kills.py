"""SIGKILL and SIGTERM at random moments of runs of one process and of two, with and without decoding processes."""

import os
import shutil
import signal
import time

from tests.campaign import runs

# (name, how the run is made, share of the kills). SIGTERM comes a fifth as often.
VARIANTS = (
    ("one process", {}, 0.4),
    ("one process, two that decode", {"workers": 2}, 0.2),
    ("two processes", {"processes": 2}, 0.3),
    ("two processes, one each that decodes", {"processes": 2, "workers": 1}, 0.1),
)
# Hits that one workdir takes before its run may end.
_EACH = 4


def run(place, kills, terms, until, report):
    """Hit runs `kills` times with SIGKILL and `terms` times with SIGTERM; stop at the time `until`.

    report(kind, variant, wrong): after each hit; wrong is None, or says what went wrong.
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
    """One workdir: hit, started again, hit again, and in the end left alone; its curve is then the uninterrupted one's."""
    run, done, wrong = runs.Run(place, "hit", **how), [], None
    for number in hits:
        while True:
            run.start()
            if run.until_random(draw):
                break
            codes = run.wait()
            if any(codes):
                wrong = wrong or f"it ended with {codes} before it was hit"
                break
            shutil.rmtree(run.workdir)  # it was quicker: from the start again
            done.clear()
        done.append(number)
        target = run.children[draw.randrange(len(run.children))]
        if number == signal.SIGTERM:
            for child in run.children:
                child.terminate()
            codes = run.wait(60)
            # Before its first step is done, there is nothing to save, and the signal ends it as it ends any process.
            if any(code not in (143, -signal.SIGTERM, 0) for code in codes):
                wrong = wrong or f"SIGTERM ended it with {codes}"
        else:
            os.kill(target.pid, signal.SIGKILL)
            target.wait()
            run.kill()  # its peers and decoders, as a scheduler does
    run.start()
    codes = run.wait()
    if any(codes):
        wrong = wrong or f"started again it ended with {codes}"
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
