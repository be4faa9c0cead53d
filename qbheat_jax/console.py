"""How the program ends: with its results out, one line where it failed, and at once, whatever its threads wait for.

stdout is written here alone, so that a reader that is gone (`qbheat ... | head`) ends a command in silence.
"""

import atexit
import contextlib
import os
import shlex
import signal
import socket
import sys
import threading

from qbheat_jax.errors import CLOSED, RUN_FAILED, UserError

INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"

# Seconds that the main thread has to hear of Ctrl-C, which it cannot inside XLA's compiler; and that threads have to end in
# once a command has failed.
HEAR, END = 3.0, 10.0


class Ended(UserError):
    """The reader of stdout is gone: a silent end, with the exit code of a program that SIGPIPE ended."""

    def __init__(self):
        super().__init__("the reader of stdout is gone", exit_code=CLOSED)


def say(text):
    """Print to stdout, at once."""
    with _stdout():
        print(text, flush=True)


def command():
    """Return the command line of this process as a reader may type it."""
    return shlex.join(["qbheat", *sys.argv[1:]])


def flush():
    """Have what others have printed to stdout written."""
    with _stdout():
        if sys.stdout is not None:  # as where it was closed from the start
            sys.stdout.flush()


@contextlib.contextmanager
def _stdout():
    """What is wrong with stdout as an error of ours; it then takes whatever comes, for all that is still in its buffer."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise Ended from error
        raise UserError(f"stdout cannot be written: {error.strerror}", exit_code=RUN_FAILED) from error


def tell(line):
    """Print to stderr, if anybody still listens."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Program:
    """Around the whole of a program: `with Program() as program: program.code = main()`.

    Once its exit hooks have run it ends, without tearing down the libraries that it has loaded. Ctrl-C ends it within
    HEAR seconds where the main thread hears nothing, and a command that failed ends within END seconds.
    """

    def __init__(self):
        self.code = RUN_FAILED  # of an exception that nobody caught
        self._heard = threading.Event()

    def __enter__(self):
        atexit.register(self._leave)  # registered before all others, it is called after them
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
            signal.signal(signal.SIGINT, self._interrupt)
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, SystemExit):
            self.code = error.code if isinstance(error.code, int) else 0 if error.code is None else RUN_FAILED
        if self.code:
            timer = threading.Timer(END, self._leave)
            timer.daemon = True
            timer.start()

    def _interrupt(self, number, frame):
        self._heard.set()
        raise KeyboardInterrupt

    def _listen(self, reader):
        while True:
            if signal.SIGINT in reader.recv(64):
                if not self._heard.wait(HEAR):
                    tell(f"qbheat: error: {INTERRUPTED}")
                    self._leave()
                self._heard.clear()

    def _leave(self):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self.code)
