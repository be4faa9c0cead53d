"""Runs of several processes: how they join, which one logs, and how they stop together."""

import contextlib
import logging
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax import console
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.train import rendezvous

log = logging.getLogger("qbheat")

# The environment variable that each command line flag defaults to.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}

# Seconds that processes wait for each other at the start.
WAIT = 300.0


def start(coordinator=None, processes=None, process=None, wait=None):
    """Join the other processes of the run, if there are any, before any array is made.

    Until there is something to save, SIGTERM then ends the process.

    With coordinator "auto", jax finds all three values. It knows Slurm, Open MPI, GKE and the metadata of TPU VMs. If no
    value is given, this also happens where the environment indicates several processes.

    Args:
      coordinator: HOST:PORT of process 0, or "auto"; None reads the environment (VARIABLES), as for the next two.
      processes: number of processes.
      process: index of this process.
      wait: seconds to wait for the others; None for WAIT.

    Raises:
      UserError: the values are incomplete or inconsistent, or (exit code 1) the others do not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
    seconds = _seconds(wait)
    if given["coordinator"] == "auto" or (not any(v is not None for v in given.values()) and several(os.environ)):
        address, count, index, devices = _detected(seconds)
    elif any(value is not None for value in given.values()):
        (address, count, index), devices = _checked(**given), None
    else:
        count = 1
    if count > 1:
        _join(address, count, index, devices, seconds)
    # jax's coordination service and libtpu install handlers of their own; libtpu's, as it starts, prints a stack trace.
    jax.devices()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def several(environment):
    """Return whether the variables that schedulers set indicate more than one process.

    >>> several({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}), several({"TPU_WORKER_HOSTNAMES": "localhost"})
    (True, False)
    """
    slurm = _slurm_tasks(environment) or "1"
    counts = (slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1"), environment.get("MEGASCALE_NUM_SLICES", "1"))
    return any(int(n) > 1 for n in counts if n.isdigit()) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def _slurm_tasks(environment):
    """Return the number of tasks of this Slurm step as text, None outside srun. The whole job may have more tasks."""
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")


def _detected(seconds):
    """Return (HOST:PORT, number of processes, index, local devices) as jax detects them."""
    from jax._src import clusters  # there is no public API, and jax's own start would only keep waiting

    log.info("detecting the other processes of the run")
    tasks = _slurm_tasks(os.environ)
    if tasks:
        os.environ["SLURM_NTASKS"] = tasks  # the variable that jax reads
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(seconds) or 1
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(error) from error
    if None in found[:3]:
        raise UserError(
            "--coordinator auto detects no Slurm, Open MPI, GKE or TPU VM: give --coordinator HOST:PORT, --processes and "
            "--process",
            exit_code=RUN_FAILED,
        )
    address, count, index, devices = found
    return address, count, index, None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else devices


def _seconds(wait):
    try:
        seconds = WAIT if wait is None else float(wait)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UserError(f"--wait {wait} is not accepted: it takes seconds, above 0 and below 1e6")
    return seconds


def _checked(coordinator, processes, process):
    """Return (HOST:PORT, number of processes, index); raise a UserError that names what is missing or wrong."""
    missing = [f"--{name} (or {VARIABLES[name]})" for name, value in locals().items() if value is None]
    if missing:
        raise UserError(f"a run of several processes needs {' and '.join(missing)} too, or --coordinator auto alone")
    try:
        count, index, port = int(processes), int(process), int(coordinator.rpartition(":")[2])
    except ValueError:
        count = index = port = 0
    if not (":" in coordinator and 0 < port < 2**16 and count >= 1 and 0 <= index < count):
        raise UserError(
            f"--coordinator {coordinator} --processes {processes} --process {process} is not accepted: give HOST:PORT of "
            "process 0, the number of processes, and the index of this one, counted from 0"
        )
    return coordinator, count, index


def _unreachable(error, where=""):
    return UserError(
        f"the other processes of the run cannot be joined {where}({str(error).strip().splitlines()[0]}): start all of "
        "them with the same coordinator and number of processes",
        exit_code=RUN_FAILED,
    )


def _join(address, count, index, devices, seconds):
    rendezvous.meet(address, count, index, seconds)
    try:
        jax.distributed.initialize(address, count, index, devices)
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error, f"at {address} ") from error
    if jax.process_index():
        log.setLevel(logging.WARNING)  # only process 0 logs progress
    log.info("process %d of %d, %d devices in all", jax.process_index(), jax.process_count(), jax.device_count())


def say(text):
    """Print to stdout from process 0 only."""
    if jax.process_index() == 0:
        console.say(text)


def first(function):
    """Call function() in process 0 only; return its result there and None elsewhere. Every process raises its UserError."""
    result, failure = None, ""
    if jax.process_index() == 0:
        try:
            result = function()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            failure = f"{error.exit_code} {error}"
    if jax.process_count() > 1:
        buffer = np.zeros(2048, np.uint8)
        encoded = np.frombuffer(failure.encode(), np.uint8)[: len(buffer)]
        buffer[: len(encoded)] = encoded
        failure = (
            bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8))
            .rstrip(b"\0")
            .decode(errors="replace")
        )
        if failure:
            code, message = failure.split(" ", 1)
            raise UserError(message, exit_code=int(code))
    return result


def agreed(value):
    """Return process 0's bool `value` in every process."""
    if jax.process_count() == 1:
        return bool(value)
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name):
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Stopped(BaseException):
    """SIGTERM arrived during work that may be abandoned at once."""


class PreemptionGuard:
    """Report, identically in all processes, whether any process of the run has received SIGTERM.

    Every process calls `should_stop()` once a step. A single process answers from its own signal. Several processes sum
    their answers over all devices and read the sum of the previous step, which is already there. So devices never wait for
    a host, and all hosts stop at the same step, one step later. Further SIGTERMs change nothing: saving goes on.
    """

    def __init__(self):
        self._signalled, self._sum, self._before, self._idle = False, None, None, False
        self._main = threading.current_thread() is threading.main_thread()  # only this thread can set handlers
        if self._main:
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        if jax.process_count() > 1:
            mesh = Mesh(np.asarray(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def close(self):
        """Restore the previous SIGTERM handler."""
        if self._main:
            signal.signal(signal.SIGTERM, self._handler)

    @contextlib.contextmanager
    def idle(self):
        """Raise `Stopped` on SIGTERM while inside, for work that may be abandoned, such as a wait for data.

        With several processes nothing is raised, because the others would wait for the one that left.
        """
        try:
            self._idle = self._sum is None
            if self._idle and self._signalled:
                raise Stopped
            yield
        finally:
            self._idle = False

    def _on_sigterm(self, number, frame):
        self._signalled = True
        if self._idle:
            self._idle = False
            raise Stopped

    def should_stop(self):
        """Return whether to stop; every process calls this once a step."""
        if self._sum is None:
            return self._signalled
        mine = np.full(1, self._signalled, np.int32)
        votes = jax.make_array_from_callback((jax.device_count(),), self._split, lambda _: mine)
        before, self._before = self._before, self._sum(votes)
        return before is not None and int(before) > 0
