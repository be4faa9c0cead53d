"""Entry point of the GPU check: run the chosen parts one after the other and write the report."""

import argparse
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from qbheat_jax import __version__
from qbheat_jax.tools.gpu_check import FULL, PARTS, TINY, job, pool, text
from qbheat_jax.train import runtime as runtime_lib

# Time limit for the query of the machine, in which jax has to start.
FACTS_SECONDS = 60


def main(argv=None):
    """Run the check. Return the exit code: 0 all passed, 1 a part did not pass, 2 the check cannot run."""
    arguments = _parser().parse_args(argv)
    if arguments.job:
        return _work(*arguments.job, arguments.out, TINY if arguments.tiny else FULL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit also stops the jobs
    out = pathlib.Path(arguments.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    environment = _environment(out, arguments.tiny)
    machine, error = _machine(out, environment, arguments.tiny)
    if error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    result = {"machine": machine, "tiny": arguments.tiny, "parts": {}}
    left = 0.0
    for name in arguments.parts or PARTS:
        seconds = arguments.limit or PARTS[name].seconds + left
        began = time.monotonic()
        _part(name, seconds, result, out, environment, arguments)
        left = max(0.0, seconds - (time.monotonic() - began))
    print(out / "result.md")
    return 0 if all(part["passed"] for part in result["parts"].values()) else 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description="Check correctness, resumption and speed on a machine with a GPU, in about seven minutes. "
        "Writes result.json and result.md.",
    )
    known = ", ".join(PARTS)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=f"some of {known} (default: all)"
    )
    parser.add_argument(
        "--out", default="runs/gpu_check", metavar="DIR", help="directory of all files (default: runs/gpu_check)"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="time limit of each part (default: 7 minutes for all parts)"
    )
    many = "parallel processes; 1 gives the cleanest timing (default: at most 3 for timed parts, else one per core)"
    parser.add_argument("--jobs", type=int, metavar="N", help=many)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to test this program on a CPU")
    parser.add_argument("--job", nargs=2, metavar=("PART", "NAME"), help=argparse.SUPPRESS)
    return parser


def _work(part, name, folder, sizes):
    """Run one job in this process and return the exit code."""
    if part == "machine":
        print(json.dumps(_facts()))
        return 0
    if sizes.tiny:
        from qbheat_jax.tools.gpu_check import tiny

        tiny.register()
    this = job.Job(name, sizes, folder)
    this.save()
    importlib.import_module(f"qbheat_jax.tools.gpu_check.{part}").run(this)
    this.save()
    return 0


def _environment(out, tiny):
    """Return the jobs' environment variables. Jobs share one GPU, so jax must not preallocate its memory."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(out / "compiled_torch"))
    if not tiny:
        environment["JAX_PLATFORMS"] = "cuda,cpu"
        environment["XLA_FLAGS"] = runtime_lib.gpu_flags()  # as the command line sets them
    return environment


def _machine(out, environment, tiny):
    """Return (properties of the machine, ""), or (None, reason why the check cannot run)."""
    warm = os.path.isdir(environment["JAX_COMPILATION_CACHE_DIR"])
    command = _command("machine", "facts", out, tiny)
    try:
        got = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FACTS_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"jax did not start within {FACTS_SECONDS} s"
    if got.returncode:
        last = (got.stderr.strip().splitlines() or ["no output"])[-1]
        return None, f"jax does not start on this machine ({last[:300]}); --tiny tests the program on a CPU"
    facts = json.loads(got.stdout.splitlines()[-1])
    if facts["platform"] != "gpu" and not tiny:  # without CUDA, jax falls back to the CPU with only a warning
        return None, "jax finds no GPU on this machine; --tiny tests the program on a CPU"
    return {**facts, "compiled_before": warm}, ""


def _facts():
    import jax

    from qbheat_jax.report.environment import versions

    device = jax.devices()[0]
    packages = "jax jaxlib flax optax orbax-checkpoint numpy torch triton".split()
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "driver": _driver(),
        "cores": runtime_lib.cores(),
        "python": sys.version.split()[0],
        "versions": {"qbheat_jax": __version__, **dict(versions(packages))},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _command(part, name, folder, tiny):
    command = [sys.executable, "-m", "qbheat_jax.tools.gpu_check", "--job", part, name, "--out", str(folder)]
    return command + (["--tiny"] if tiny else [])


def _part(name, seconds, result, out, environment, arguments):
    """Run one part and add it to the result. The result's files are rewritten after each job."""
    part, began = PARTS[name], time.monotonic()
    names = part.tiny if arguments.tiny else part.jobs
    entry = {"question": part.question, "limit": seconds, "seconds": 0.0, "passed": None, "jobs": {}}
    result["parts"][name] = entry
    # Timed sections take turns, but compilation in other jobs also uses the GPU for autotuning.
    parallel = arguments.jobs or (max(1, min(3, runtime_lib.cores() // 4)) if part.timed else runtime_lib.cores())
    environment = {**environment, "OMP_NUM_THREADS": str(max(1, runtime_lib.cores() // parallel))}  # for PyTorch

    def on_end(which, outcome):
        entry["jobs"][which] = outcome
        entry["seconds"] = time.monotonic() - began
        print(f"{name} {which}: {outcome['state']} ({outcome['seconds']:.0f} s) {outcome['error']}", file=sys.stderr)
        _write(result, out)

    print(f"{name}: at most {seconds:.0f} s", file=sys.stderr)
    commands = {which: _command(name, which, out / name / which, arguments.tiny) for which in names}
    entry["jobs"] = pool.run(commands, out / name, environment, seconds, parallel, part.timed, on_end)
    entry["seconds"] = time.monotonic() - began
    entry["passed"] = all(outcome["state"] == "passed" for outcome in entry["jobs"].values())
    _write(result, out)


def _write(result, out):
    job.replace(out / "result.json", json.dumps(result, indent=2) + "\n")
    job.replace(out / "result.md", text.markdown(result))


if __name__ == "__main__":
    sys.exit(main())
