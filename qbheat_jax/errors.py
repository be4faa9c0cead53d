"""The one user-facing error: a single sentence that says what is wrong and what would be accepted."""

BAD_INPUT = 2
RUN_FAILED = 1


class UserError(Exception):
    """Shown as one line, without a traceback; the process exits with `exit_code`.

    `exit_code` is `BAD_INPUT` (2) where the user's input is wrong and `RUN_FAILED` (1) where a run
    that was rightly asked for could not go on (a loss that is not finite, a full disk).
    """

    def __init__(self, message, *, exit_code=BAD_INPUT):
        super().__init__(" ".join(str(message).split()))
        self.exit_code = exit_code
