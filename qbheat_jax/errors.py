"""The user-facing error, shown as one line, and the exit codes.

0: done. 1 (RUN_FAILED): the run failed. 2 (BAD_INPUT): the user's input is wrong. 143 (PREEMPTED): SIGTERM stopped the run
after it had saved its state; the same command resumes without loss. 141 (CLOSED): the reader of stdout went away
(`qbheat ... | head`); all results are on disk.

143 is 128 + 15, the shell's code for a process killed by SIGTERM. Schedulers count it as a failure and restart preempted
jobs. Where there is nothing to save, SIGTERM kills the process itself. 141 is the same for SIGPIPE.
"""

import contextlib
import difflib
from collections.abc import Collection, Iterator

BAD_INPUT = 2
RUN_FAILED = 1
PREEMPTED = 143
CLOSED = 141


def first_line(error: object, most: int = 200) -> str:
    """Return the first line of an error's message, at most `most` characters, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class UserError(Exception):
    """An error shown as one line without a traceback: it names the field or file, the value and what is accepted.

    The process exits with `exit_code`: BAD_INPUT for wrong input; RUN_FAILED for a valid run that could not continue (a
    loss that is not finite, a full disk); PREEMPTED for a run stopped by SIGTERM; CLOSED for a closed stdout.
    """

    def __init__(self, message: object, *, exit_code: int = BAD_INPUT) -> None:
        super().__init__(" ".join(str(message).split()))
        self.exit_code = exit_code


@contextlib.contextmanager
def writing(place: object, exit_code: int = BAD_INPUT) -> Iterator[None]:
    """Raise a UserError that names `place` where the block raises an OSError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{place} cannot be written: {reason}", exit_code=exit_code) from error


_LISTED = 30  # names that an error lists beside the nearest


def unknown(what: str, name: object, known: Collection[str]) -> UserError:
    """Return the UserError of an unknown name, with the nearest of the known ones, and all where they are few.

    >>> str(unknown("config field sed", "sed", ["seed", "dtype"]))
    'config field sed is unknown; did you mean seed? there are seed, dtype'
    """
    near = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    hints = [f"did you mean {near[0]}?"] if near else []
    if not near or len(known) <= _LISTED:
        hints.append(f"there are {', '.join(known)}")
    return UserError(f"{what} is unknown; {' '.join(hints)}")
