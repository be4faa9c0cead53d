"""Several processes that make one run: how they find each other, whose words are shown, and when they stop together."""

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

# Each flag of the command line and the variable that stands in for it.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}

# Seconds that the processes of a run wait for each other at its start.
WAIT = 300.0


def start(coordinator=None, processes=None, process=None, wait=None):
    """Joins the other processes of the run, before any array is made; does nothing where this is the only one.

    coordinator: HOST:PORT of process 0, processes: how many there are, process: which of them this is; what is None comes
    from the environment (VARIABLES). coordinator "auto" leaves all three to jax, which knows Slurm, Open MPI, GKE and the
    metadata of TPU VMs; without any of them that is done where the environment tells of several processes.
    wait: how many seconds the others may take to come; None: WAIT.
    Raises UserError for what does not go together, and (exit code 1) where the others do not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
    seconds = _seconds(wait)
    if given["coordinator"] == "auto" or (not any(v is not None for v in given.values()) and several(os.environ)):
        address, count, index, devices = _detected(seconds)
    elif any(value is not None for value in given.values()):
        (address, count, index), devices = _checked(**given), None
    else:
        return
    if count > 1:
        _join(address, count, index, devices, seconds)


def several(environment):
    """Whether the variables that schedulers set tell of more than one process.

    >>> several({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}), several({"TPU_WORKER_HOSTNAMES": "localhost"})
    (True, False)
    """
    slurm = _slurm_tasks(environment) or "1"
    counts = (slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1"), environment.get("MEGASCALE_NUM_SLICES", "1"))
    return any(int(n) > 1 for n in counts if n.isdigit()) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def _slurm_tasks(environment):
    """How many tasks this step of Slurm's has, as text; None outside of srun. The whole job may have more tasks."""
    if "SLURM_STEP_NODELIST" not in environment:
        return None
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")


def _detected(seconds):
    """(HOST:PORT, number, index, local devices), as jax finds them out."""
    from jax._src import clusters  # jax shows this nowhere else, and would itself only go on to wait

    log.info("finding the other processes of the run, as jax does")
    tasks = _slurm_tasks(os.environ)
    if tasks:
        os.environ["SLURM_NTASKS"] = tasks  # which is what jax reads
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(seconds) or 1
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(error) from error
    if None in found[:3]:
        raise UserError(
            "--coordinator auto finds no Slurm, Open MPI, GKE or TPU VM here: give --coordinator HOST:PORT, --processes and "
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
        raise UserError(f"--wait {wait} is not accepted: it takes seconds")
    return seconds


def _checked(coordinator, processes, process):
    """(HOST:PORT, number, index), or a UserError that names what is missing or wrong."""
    missing = [f"--{name} (or {VARIABLES[name]})" for name, value in locals().items() if value is None]
    if missing:
        raise UserError(f"a run of several processes needs {' and '.join(missing)} too, or --coordinator auto alone")
    try:
        count, index, port = int(processes), int(process), int(coordinator.rpartition(":")[2])
    except ValueError:
        count = index = port = 0
    if not (":" in coordinator and 0 < port < 2**16 and count >= 1 and 0 <= index < count):
        raise UserError(
            f"--coordinator {coordinator} --processes {processes} --process {process} is not accepted: it takes HOST:PORT of "
            "process 0, how many processes there are, and which of them this is, counted from 0"
        )
    return coordinator, count, index


def _unreachable(error, where=""):
    return UserError(
        f"the other processes of the run cannot be joined {where}({str(error).strip().splitlines()[0]}): start all of "
        "them, with the same coordinator and number of processes",
        exit_code=RUN_FAILED,
    )


def _join(address, count, index, devices, seconds):
    rendezvous.meet(address, count, index, seconds)
    try:
        jax.distributed.initialize(address, count, index, devices)
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error, f"at {address} ") from error
    # jax has put a handler of its own in place. Until there is something to save, SIGTERM simply ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index():
        log.setLevel(logging.WARNING)  # process 0 speaks for all
    log.info("process %d of %d, %d devices in all", jax.process_index(), jax.process_count(), jax.device_count())


def say(text):
    """To stdout, once for all processes."""
    if jax.process_index() == 0:
        console.say(text)


def first(function):
    """Return function() in process 0, which alone calls it, and None in the others. All raise its UserError."""
    result, said = None, ""
    if jax.process_index() == 0:
        try:
            result = function()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            said = f"{error.exit_code} {error}"
    if jax.process_count() > 1:
        buffer = np.zeros(2048, np.uint8)
        encoded = np.frombuffer(said.encode(), np.uint8)[: len(buffer)]
        buffer[: len(encoded)] = encoded
        said = (
            bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8))
            .rstrip(b"\0")
            .decode(errors="replace")
        )
        if said:
            code, message = said.split(" ", 1)
            raise UserError(message, exit_code=int(code))
    return result


def agreed(value):
    """Return process 0's `value`, a bool, in every process."""
    if jax.process_count() == 1:
        return bool(value)
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name):
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Stopped(BaseException):
    """SIGTERM has come to what may be left off at once."""


class PreemptionGuard:
    """Until it is closed: whether SIGTERM has come to any process of the run, with the same answer in all of them.

    `should_stop()` is called once a step by every process. One process alone hears of the signal at once. Of several, each puts
    its answer into a sum over all devices and reads the sum of the step before, which is there already: devices never
    wait for a host, and all hosts read the same numbers at the same steps. They stop one step later for it. Further
    SIGTERMs change nothing: what is being saved is saved.
    """

    def __init__(self):
        self._asked, self._sum, self._before, self._idle = False, None, None, False
        self._main = threading.current_thread() is threading.main_thread()  # handlers can be set nowhere else
        if self._main:
            self._handler = signal.signal(signal.SIGTERM, self._hear)
        if jax.process_count() > 1:
            mesh = Mesh(np.asarray(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def close(self):
        if self._main:
            signal.signal(signal.SIGTERM, self._handler)

    @contextlib.contextmanager
    def idle(self):
        """Around what may be left off, such as a wait for data: SIGTERM then raises `Stopped` at once.

        Of several processes none does so by itself, since the others could only wait for it.
        """
        try:
            self._idle = self._sum is None
            if self._idle and self._asked:
                raise Stopped
            yield
        finally:
            self._idle = False

    def _hear(self, number, frame):
        self._asked = True
        if self._idle:
            self._idle = False
            raise Stopped

    def should_stop(self):
        if self._sum is None:
            return self._asked
        mine = np.full(1, self._asked, np.int32)
        votes = jax.make_array_from_callback((jax.device_count(),), self._split, lambda _: mine)
        before, self._before = self._before, self._sum(votes)
        return before is not None and int(before) > 0
