"""The one user-facing error: a single sentence that says what is wrong and what would be accepted.

Exit codes of the command line: 0 done; 1 (RUN_FAILED) the run failed; 2 (BAD_INPUT) the user's input is wrong; 143
(PREEMPTED) the run was stopped by SIGTERM after it had saved all it had done, so that the same command goes on from there
with nothing lost; 141 (CLOSED) the reader of stdout went away (`qbheat ... | head`), all results are on disk.
143 is 128 + 15, what a shell makes of a process that SIGTERM ended: to schedulers it is no success, and those that restart
what was preempted restart it. Where there is nothing to save, SIGTERM does end the process. 141 is the same for SIGPIPE.
"""

import contextlib
import difflib

BAD_INPUT = 2
RUN_FAILED = 1
PREEMPTED = 143
CLOSED = 141


def first_line(error, most=200):
    """The first line of what an error says, at most so many characters of it; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class UserError(Exception):
    """Shown as one line, without a traceback; the process exits with `exit_code`.

    `exit_code` is `BAD_INPUT` (2) where the user's input is wrong, `RUN_FAILED` (1) where a run that was rightly asked for
    could not go on (a loss that is not finite, a full disk), `PREEMPTED` (143) where it was stopped, and `CLOSED` (141)
    where nobody reads its output.
    """

    def __init__(self, message, *, exit_code=BAD_INPUT):
        super().__init__(" ".join(str(message).split()))
        self.exit_code = exit_code


@contextlib.contextmanager
def writing(place, exit_code=BAD_INPUT):
    """Raise a UserError that names `place` where the block raises an OSError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{place} cannot be written: {reason}", exit_code=exit_code) from error


_LISTED = 30  # names that an error lists beside the nearest


def unknown(what, name, known):
    """Return the UserError of an unknown name, with the nearest of the known ones, and all where they are few.

    >>> str(unknown("config field sed", "sed", ["seed", "dtype"]))
    'config field sed is unknown; did you mean seed? there are seed, dtype'
    """
    near = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    hints = [f"did you mean {near[0]}?"] if near else []
    if not near or len(known) <= _LISTED:
        hints.append(f"there are {', '.join(known)}")
    return UserError(f"{what} is unknown; {' '.join(hints)}")
