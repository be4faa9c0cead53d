"""Write to stdout and stderr, and end the program: on Ctrl-C, on errors, and without waiting for library threads.

Only this module writes to stdout, so a closed pipe (`qbheat ... | head`) ends a command without an error message.
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

INTERRUPTED = "interrupted; run the same command again to resume from the last checkpoint"

# HEAR: seconds that the main thread has to react to Ctrl-C, which it cannot do inside XLA's compiler.
# END: seconds that other threads have to finish after a command has failed.
HEAR, END = 3.0, 10.0


class Ended(UserError):
    """The reader of stdout is gone. Exit silently, with the code of a program killed by SIGPIPE."""

    def __init__(self):
        super().__init__("the reader of stdout is gone", exit_code=CLOSED)


def say(text):
    """Print to stdout and flush."""
    with _stdout():
        print(text, flush=True)


def command():
    """Return the command line of this process as a reader may type it."""
    return shlex.join(["qbheat", *sys.argv[1:]])


def flush():
    """Flush what others have printed to stdout."""
    with _stdout():
        if sys.stdout is not None:  # None if it was closed before the program started
            sys.stdout.flush()


@contextlib.contextmanager
def _stdout():
    """Convert a failing stdout into a UserError, and redirect it to /dev/null, so that its buffer can still be flushed."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise Ended from error
        raise UserError(f"stdout cannot be written: {error.strerror}", exit_code=RUN_FAILED) from error


def tell(line):
    """Print to stderr; ignore a closed stderr."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Program:
    """Wrap a whole program: `with Program() as program: program.code = main()`.

    The process exits after its exit hooks, without tearing down loaded libraries. If the main thread does not react to
    Ctrl-C within HEAR seconds, the process exits anyway. A failed command exits within END seconds.
    """

    def __init__(self):
        self.code = RUN_FAILED  # the exit code after an uncaught exception
        self._heard = threading.Event()

    def __enter__(self):
        atexit.register(self._leave)  # registered first, so it runs last
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless SIGINT is ignored, as under nohup
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
