"""Disks that are full or read-only, files that are torn or bit-flipped, and other numbers of devices."""

import os
import shutil
import subprocess
import time

from tests.campaign import runs

_MIB = 1 << 20


def _ended(run, whole, rtol=0.0):
    """Why a run that is started again does not end well with that curve, or None."""
    run.start()
    codes = run.wait()
    if any(codes):
        return f"started again it ended with {codes}"
    try:
        return runs.differs(run.curve(), whole, rtol)
    except (OSError, ValueError) as error:
        return str(error)


def damage(place, until, report):
    """Tear, flip a bit of, empty and remove every file of the newest checkpoint: the one before it is taken.

    Like the other faults it stops at the time `until`, and calls report(kind, what, wrong) after each try.
    """
    whole = runs.expected(place)
    run = runs.Run(place, "damaged")
    run.start()
    while run.running() and run.lines() < 10:
        time.sleep(0.02)
    run.kill()
    kept = run.workdir.with_name("kept")
    shutil.move(run.workdir, kept)
    whole_ones = (path for path in (kept / "checkpoints").iterdir() if path.name.isdigit())
    newest = max(whole_ones, key=lambda path: int(path.name))
    files = sorted(path.relative_to(kept) for path in newest.rglob("*") if path.is_file())
    files += [path.relative_to(kept) for path in (kept / "metrics.jsonl", kept / "config.json")]
    draw = runs.seeded("damaged")
    for file in files:
        for kind in ("torn", "flipped", "emptied", "removed"):
            if time.monotonic() > until:
                return
            shutil.copytree(kept, run.workdir)
            _damage(run.workdir / file, kind, draw)
            wrong = _ended(run, whole)
            # Lines of metrics that were on the disk alone cannot come back: what counts is how it ends.
            if (
                wrong
                and file.name == "metrics.jsonl"
                and wrong.startswith(("it tells", "Expecting", "Invalid", "Unterm"))
            ):
                wrong = None
            if "Traceback" in run.log():
                wrong = wrong or "a traceback was printed"
            report("damaged file", f"{kind} {file.parts[-1]}", _told(wrong, run))
            run.remove()
    shutil.rmtree(kept)


def _damage(path, kind, draw):
    data = bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
        return
    if kind == "torn":
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == "emptied":
        data = b""
    elif data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def devices(place, until, report):
    """Go on with 8, 4, 1 and 8 devices, killed between. Sums are taken in another order, so the curve is nearly the same."""
    whole = runs.expected(place)
    run, wrong = runs.Run(place, "devices"), None
    for count, lines in ((8, 6), (4, 12), (1, 18)):
        run.devices = count
        run.start()
        end = time.monotonic() + runs.LIMIT
        while run.running() and run.lines() < lines and time.monotonic() < end:
            time.sleep(0.02)
        wrong = wrong or (None if run.running() else f"with {count} devices it ended early")
        run.kill()
    run.devices = 8
    report("other devices", "8, 4, 1, 8", _told(wrong or _ended(run, whole, rtol=1e-3), run))
    run.remove()


def disks(place, until, report):
    """Train on a disk that fills up, or becomes read-only, at a random moment; with room again the run goes on."""
    if os.geteuid() or not shutil.which("mount"):
        print("no disk of its own can be made: that takes root", flush=True)
        return
    whole, draw = runs.expected(place), runs.seeded("disks")
    for kind in ("full", "read-only") * 6:
        if time.monotonic() > until:
            return
        disk = place / "disk"
        disk.mkdir(exist_ok=True)
        size = draw.randrange(1, 90) * _MIB if kind == "full" else 999 * _MIB
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
        ).returncode:
            print("no disk of its own can be made: mount is not allowed", flush=True)
            return
        try:
            report("disk", kind, _on_disk(disk, kind, whole, draw))
        finally:
            while os.path.ismount(disk):
                subprocess.run(["umount", "-l", disk], check=True)


def _on_disk(disk, kind, whole, draw):
    run = runs.Run(disk, "run", log=disk.parent / "disk.log")
    run.start()
    if kind == "read-only":
        run.until_random(draw)
        # Files that are open for writing keep a disk from becoming read-only, but not from being seen so by what comes after.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    codes, wrong = run.wait(), None
    if kind == "read-only":
        subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "remount,rw,size=2g", disk], check=True)
    if codes != [0] and codes not in ([1], [2]):
        wrong = f"it ended with {codes}"
    if codes != [0] and sum(line.startswith("qbheat: error") for line in run.log().splitlines()) != 1:
        wrong = wrong or "it did not end with one sentence"
    if "Traceback" in run.log():
        wrong = wrong or "a traceback was printed"
    wrong = _told(wrong or _ended(run, whole), run)
    run.remove()
    return wrong


def _told(wrong, run):
    if wrong:
        print(f"--- {wrong}\n{run.log()[-3000:]}", flush=True)
    return wrong
