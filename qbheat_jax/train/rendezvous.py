"""Let the processes of a run meet before jax starts, so that a missing process is named in the error.

jax's own coordination aborts a process that waits too long. So process 0 first listens at the address that jax's
coordinator will use later. Each other process connects and sends its index. When all have come, process 0 tells them to go.
"""

import json
import logging
import os
import selectors
import socket
import time

from qbheat_jax.errors import RUN_FAILED, UserError

log = logging.getLogger("qbheat")

ANNOUNCE = 30.0  # seconds between log lines that name the missing processes
_TICK = 0.5
_PATIENCE = 5.0  # seconds that a connected peer has to send or receive a line
_REMEDY = "start all of them with the same coordinator and number of processes; --wait SECONDS waits longer"


def meet(address, count, index, seconds):
    """Wait until all `count` processes have come to `address`.

    Args:
      address: HOST:PORT of process 0.
      count: number of processes.
      index: index of this process.
      seconds: how long to wait.

    Raises:
      UserError: exit code 1, if a process is missing after `seconds`, or indices or counts are inconsistent.
    """
    waiting = _Waiting(seconds)
    if index == 0:
        _gather(address, count, waiting)
    else:
        _come(address, count, index, waiting)


class _Waiting:
    """A deadline, and log lines at intervals until then."""

    def __init__(self, seconds):
        self.seconds, self._begin = seconds, time.monotonic()
        self._due = self._begin

    def left(self):
        """Return the seconds until the deadline, negative after it."""
        return self._begin + self.seconds - time.monotonic()

    def announce(self, message, *arguments):
        """Log a message, at most once in ANNOUNCE seconds."""
        if time.monotonic() >= self._due:
            self._due += ANNOUNCE
            log.info(message, *arguments)


def _gather(address, count, waiting):
    """Wait for the other processes and tell them to go; runs in process 0."""
    try:
        listener = _listen(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"process 0 cannot listen at {address}: {reason}", exit_code=RUN_FAILED) from error
    here = {}
    with listener, selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        while len(here) < count - 1:
            missing = sorted(set(range(1, count)) - here.keys())
            if waiting.left() <= 0:
                message = (
                    f"{_numbers(missing)} of {count} did not come to {address} within {waiting.seconds:g} s: {_REMEDY}"
                )
                for peer in here.values():
                    _tell(peer, message)
                raise UserError(message, exit_code=RUN_FAILED)
            if here:
                waiting.announce("process 0 waits at %s for %s of %d", address, _numbers(missing), count)
            else:
                others = f"{count - 1} other{'s' if count > 2 else ''}"
                waiting.announce("process 0 waits at %s for %s", address, others)
            for key, _ in ready.select(min(_TICK, max(waiting.left(), 0))):
                if key.fileobj is not listener:  # peers send nothing more, so this one has disconnected
                    ready.unregister(key.fileobj)
                    here.pop(key.data).close()
                    continue
                peer = listener.accept()[0]
                number, wrong = _introduced(peer, count, here)
                if wrong:
                    _tell(peer, wrong)
                elif number is None:
                    peer.close()
                else:
                    here[number] = peer
                    ready.register(peer, selectors.EVENT_READ, number)
        for peer in here.values():
            _tell(peer, "")


def _introduced(peer, count, here):
    """Return (index of the connected process, error message); (None, "") for an unrelated client."""
    peer.settimeout(_PATIENCE)
    try:
        said = json.loads(peer.makefile("rb").readline(200))
        number, of = int(said["qbheat"]), int(said["of"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, ""
    if of != count or not 0 < number < count:
        return number, f"process {number} of {of} came to a run of {count} processes: {_REMEDY}"
    if number in here:
        return number, f"process {number} has already come: each process needs another number"
    return number, ""


def _tell(peer, wrong):
    """Send a peer "go" or an error. The peer closes the connection first, so that the port is free again at once."""
    try:
        with peer:
            peer.settimeout(_PATIENCE)
            peer.sendall(json.dumps({"qbheat": "no" if wrong else "go", "why": wrong}).encode() + b"\n")
            peer.recv(1)
    except OSError:  # the peer has disconnected
        return


def _come(address, count, index, waiting):
    """Connect to process 0 and wait for its answer; runs in every other process."""
    host, port = _split(address)
    while waiting.left() > 0:
        waiting.announce("process %d of %d waits for process 0 at %s", index, count, address)
        try:
            with socket.create_connection((host, port), timeout=min(_PATIENCE, waiting.left())) as peer:
                peer.sendall(json.dumps({"qbheat": index, "of": count}).encode() + b"\n")
                answer = _answer(peer, address, count, index, waiting)
        except (OSError, ValueError, TypeError, KeyError):  # nobody listens yet, or an unrelated server does
            answer = None
        if answer == "":
            return
        if answer:
            raise UserError(answer, exit_code=RUN_FAILED)
        time.sleep(_TICK)
    raise UserError(
        f"process {index} of {count} found no process 0 at {address} within {waiting.seconds:g} s: {_REMEDY}",
        exit_code=RUN_FAILED,
    )


def _answer(peer, address, count, index, waiting):
    """Return process 0's error message, "" to go, or None if it disconnected or time is up."""
    said = b""
    peer.settimeout(_TICK)
    while not said.endswith(b"\n"):
        if waiting.left() <= -_PATIENCE:  # process 0 may have started later, and should report first
            return None
        waiting.announce("process %d of %d waits at %s for the others", index, count, address)
        try:
            part = peer.recv(4096)
        except TimeoutError:
            continue
        if not part:
            return None
        said += part
    said = json.loads(said)
    return str(said["why"]) if said["qbheat"] == "no" else {"go": ""}[said["qbheat"]]


def _listen(address):
    """Return a listening socket at the address of jax's coordinator: by default, this port on all interfaces."""
    host, port = _split(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{_split(address)[1]}"))
    if host != "::":
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=4096)


def _split(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _numbers(missing):
    few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"process{'es' if len(missing) > 1 else ''} {few}"
