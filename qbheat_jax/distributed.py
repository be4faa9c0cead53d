"""Several processes that make one run: how they find each other, whose words are shown, and when they stop together."""

import logging
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax.errors import RUN_FAILED, UserError

log = logging.getLogger("qbheat")

# Each flag of the command line and the variable that stands in for it.
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


def start(coordinator=None, processes=None, process=None):
    """Joins the other processes of the run, before any array is made; does nothing where this is the only one.

    coordinator: HOST:PORT of process 0, processes: how many there are, process: which of them this is; what is None comes
    from the environment (VARIABLES). coordinator "auto" leaves all three to jax, which knows Slurm, Open MPI, GKE and the
    metadata of TPU VMs; without any of them that is done where the environment tells of several processes.
    Raises UserError for what does not go together, and (exit code 1) where the others cannot be reached.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {name: os.environ.get(VARIABLES[name]) if value is None else value for name, value in given.items()}
    if given["coordinator"] == "auto" or (not any(v is not None for v in given.values()) and several(os.environ)):
        _join()
    elif any(value is not None for value in given.values()):
        address, count, index = _checked(**given)
        if count > 1:
            _join(address, count, index)


def several(environment):
    """Whether the variables that schedulers set tell of more than one process.

    >>> several({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}), several({"TPU_WORKER_HOSTNAMES": "localhost"})
    (True, False)
    """
    slurm = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in environment else "1"  # inside srun
    counts = (slurm, environment.get("OMPI_COMM_WORLD_SIZE", "1"), environment.get("MEGASCALE_NUM_SLICES", "1"))
    return any(int(n) > 1 for n in counts if n.isdigit()) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


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


def _join(*arguments):
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError) as error:
        where = f"at {arguments[0]} " if arguments else ""
        raise UserError(
            f"the other processes of the run cannot be joined {where}({str(error).strip().splitlines()[0]}): start all of "
            "them, with the same coordinator and number of processes",
            exit_code=RUN_FAILED,
        ) from error
    # jax has put a handler of its own in place. Until there is something to save, SIGTERM simply ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_index():
        log.setLevel(logging.WARNING)  # process 0 speaks for all
    log.info("process %d of %d, %d devices in all", jax.process_index(), jax.process_count(), jax.device_count())


def say(text):
    """To stdout, once for all processes."""
    if jax.process_index() == 0:
        print(text)


def barrier(name):
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Stopping:
    """Until it is closed: whether SIGTERM has come to any process of the run, with the same answer in all of them.

    `asked()` is called once a step by every process. One process alone hears of the signal at once. Of several, each puts
    its answer into a sum over all devices and reads the sum of the step before, which is there already: devices never
    wait for a host, and all hosts read the same numbers at the same steps. They stop one step later for it. Further
    SIGTERMs change nothing: what is being saved is saved.
    """

    def __init__(self):
        self._asked, self._sum, self._before = False, None, None
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

    def _hear(self, number, frame):
        self._asked = True

    def asked(self):
        if self._sum is None:
            return self._asked
        mine = np.full(1, self._asked, np.int32)
        votes = jax.make_array_from_callback((jax.device_count(),), self._split, lambda _: mine)
        before, self._before = self._before, self._sum(votes)
        return before is not None and int(before) > 0
