"""Faults in a run: full or read-only disks, damaged files, and changed numbers of devices."""

import os
import shutil
import subprocess
import time

from tests.campaign import runs

_MIB = 1 << 20


def _ended(run, whole, rtol=0.0):
    """Restart a run. Return None if it ends well with the loss curve `whole`, else the reason."""
    run.start()
    codes = run.wait()
    if any(codes):
        return f"after its restart it ended with exit codes {codes}"
    try:
        return runs.differs(run.curve(), whole, rtol)
    except (OSError, ValueError) as error:
        return str(error)


def damage(place, until, report):
    """Truncate, flip a bit of, empty and remove each file of the newest checkpoint, metrics.jsonl and config.json.

    The run must resume, if need be from the checkpoint before.

    Args:
      place: `Path` of a folder for the runs.
      until: Time of `time.monotonic` at which to stop.
      report: Function (kind, what, wrong) that is called after each try, such as a `Tally`.
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
            # Lost lines of metrics.jsonl cannot be restored, so only the exit code counts here.
            if (
                wrong
                and file.name == "metrics.jsonl"
                and wrong.startswith((runs.OTHER_STEPS, "Expecting", "Invalid", "Unterm"))
            ):
                wrong = None
            if "Traceback" in run.log():
                wrong = wrong or "a traceback was printed"
            report("damaged file", f"{kind} {file.parts[-1]}", _logged(wrong, run))
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
    """Resume a killed run with 8, 4, 1 and 8 devices. The order of sums differs, so the curve may differ slightly."""
    whole = runs.expected(place)
    run, wrong = runs.Run(place, "devices"), None
    for count, lines in ((8, 6), (4, 12), (1, 18)):
        run.devices = count
        run.start()
        end = time.monotonic() + runs.LIMIT
        while run.running() and run.lines() < lines and time.monotonic() < end:
            time.sleep(0.02)
        wrong = wrong or (None if run.running() else f"it ended early with {count} devices")
        run.kill()
    run.devices = 8
    report("other devices", "8, 4, 1, 8", _logged(wrong or _ended(run, whole, rtol=1e-3), run))
    run.remove()


def disks(place, until, report):
    """Train on a disk that fills up or becomes read-only at a random moment. With space again the run must resume."""
    if os.geteuid() or not shutil.which("mount"):
        print("disks: skipped, because mounting a tmpfs needs root and the program mount", flush=True)
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
            print("disks: skipped, because this system does not allow mount", flush=True)
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
        # Files open for writing prevent a read-only remount, but not a read-only bind mount on top, which later opens see.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    codes, wrong = run.wait(), None
    if kind == "read-only":
        subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "remount,rw,size=2g", disk], check=True)
    if codes != [0] and codes not in ([1], [2]):
        wrong = f"it ended with exit codes {codes}"
    if codes != [0] and sum(line.startswith("qbheat: error") for line in run.log().splitlines()) != 1:
        wrong = wrong or "it did not end with one error line"
    if "Traceback" in run.log():
        wrong = wrong or "a traceback was printed"
    wrong = _logged(wrong or _ended(run, whole), run)
    run.remove()
    return wrong


def _logged(wrong, run):
    """Print the end of the run's log if something went wrong. Return `wrong`."""
    if wrong:
        print(f"--- {wrong}\n{run.log()[-3000:]}", flush=True)
    return wrong
