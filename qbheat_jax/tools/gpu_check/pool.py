"""Run the jobs of a part as parallel processes within a time limit."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

# Words that mark the cause of a failure in a job's log.
_CAUSES = ("Check failed", "Error", "RESOURCE_EXHAUSTED", "error:")


@dataclasses.dataclass
class _Running:
    process: subprocess.Popen
    folder: pathlib.Path
    began: float


def run(commands, folder, environment, seconds, parallel, timed, on_end=lambda name, outcome: None):
    """Run jobs and return their outcomes.

    Args:
      commands: {name of a job: argv}, in the order of their start.
      folder: Each job's files go to folder/NAME, which is emptied first, and its output to folder/NAME/log.
      environment: Environment variables of the processes.
      seconds: Time limit for all jobs together, after which running jobs are killed.
      parallel: Number of parallel jobs.
      timed: Whether jobs take turns. The others are paused during a turn.
      on_end: Function of a job's name and outcome that is called at its end.

    Returns:
      {name: {"state": "passed" | "failed" | "timed out" | "not begun", "seconds", "error", "result"}}.
    """
    outcomes, running, waiting = {}, {}, dict(commands)
    end, turn = time.monotonic() + seconds, None

    def settle(name, state, error=""):
        job = running.pop(name)
        outcomes[name] = _outcome(job, state, error)
        on_end(name, outcomes[name])

    try:
        while waiting or running:
            if time.monotonic() >= end:
                break
            while waiting and len(running) < parallel and turn is None:
                name = next(iter(waiting))
                running[name] = _begin(waiting.pop(name), folder / name, environment)
            for name, job in list(running.items()):
                if job.process.poll() is not None:
                    settle(name, *_verdict(job))
            if timed:
                turn = _turns(running, turn)
            time.sleep(0.05)
    finally:
        for job in running.values():
            _signal(job, signal.SIGKILL)
            job.process.wait()
    for name in list(running):
        doing = _read(running[name]).get("doing", "starting")
        settle(name, "timed out", f"stopped at the limit of {seconds:.0f} s, while {doing}")
    for name in waiting:
        outcomes[name] = {"state": "not begun", "seconds": 0.0, "error": "no time was left", "result": {}}
        on_end(name, outcomes[name])
    return {name: outcomes[name] for name in commands}


def _begin(command, folder, environment):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return _Running(process, folder, time.monotonic())


def _turns(running, turn):
    """Give a free turn to a waiting job. Return the name of the job that has the turn, or None."""
    if turn in running and (running[turn].folder / "go").exists():
        return turn
    if turn is not None:
        for job in running.values():
            _signal(job, signal.SIGCONT)
    for name, job in running.items():
        if (job.folder / "ready").exists() and job.process.poll() is None:
            for other in running.values():
                if other is not job:
                    _signal(other, signal.SIGSTOP)
            (job.folder / "go").touch()
            return name
    return None


def _signal(job, number):
    """Send a signal to a job and its child processes."""
    try:
        os.killpg(job.process.pid, number)
    except ProcessLookupError:
        pass


def _verdict(job):
    """Return (state, error) of a job that has ended."""
    code, result = job.process.returncode, _read(job)
    problems = result.get("problems", [])
    if code == 0 and not problems:
        return ("passed", "") if result else ("failed", "it wrote no result")
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}: {_last_words(job)}"
    return "failed", "; ".join(problems) or f"exit code {code}: {_last_words(job)}"


def _outcome(job, state, error):
    return {"state": state, "seconds": time.monotonic() - job.began, "error": error, "result": _read(job)}


def _read(job):
    try:
        return json.loads((job.folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}


def _last_words(job):
    """Return the last line of the log that names a cause, else the last line, cut to 300 characters."""
    lines = [line.strip() for line in (job.folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    causes = [line for line in lines if any(word in line for word in _CAUSES)]
    return (causes or lines or ["its log is empty"])[-1][:300]
