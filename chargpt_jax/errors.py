"""Every exception of the package, with the exit code that `main` returns for it."""


class ExpectedError(Exception):
    """An error that a user is told in one sentence, without a traceback."""

    exit_code = 2


class UserError(ExpectedError, ValueError):
    """A user's mistake: the message gives the value, the rule and the fix."""


class NoCheckpoint(ExpectedError):
    """No usable checkpoint was found."""

    exit_code = 3


class NonFiniteLoss(ExpectedError):
    """Training stopped because a loss or a gradient is NaN or infinite."""

    exit_code = 4


class SaveFailed(ExpectedError):
    """A checkpoint could not be written."""

    exit_code = 5
