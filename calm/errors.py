"""Errors and notices for the user: what is wrong, where, and what to do, in one message."""

__all__ = ["UserError", "UserNotice", "root_message"]

# torch raises an error of a loader worker again, with the worker's traceback in its message.
FROM_WORKER = "Caught UserError in "


class UserError(ValueError):
    """Bad input, configuration or data; the command line prints it as one line and exits with 2.

    The message survives other processes: one that torch wrapped in a loader worker is unwrapped.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith(FROM_WORKER):
            message = message.rpartition("UserError: ")[2].strip()
        super().__init__(message)


class UserNotice(UserWarning):
    """What a user should know but need not mend; the command line prints it as one line."""


def root_message(error: BaseException) -> str:
    """The message of the first error behind `error`, in this process or in a worker of datasets."""
    while (cause := error.__cause__ or error.__context__) is not None:
        if type(cause).__name__ == "RemoteTraceback":  # text of the tracebacks, the first one first
            first = str(cause).strip('"\n').split("\n\n")[0].strip()
            return first.splitlines()[-1].partition(": ")[2] or first.splitlines()[-1]
        error = cause
    return str(error) or type(error).__name__
