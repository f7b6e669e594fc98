"""Errors and notices for the user: what is wrong, where, and what to do, in one message."""

__all__ = ["UserError", "UserNotice"]


class UserError(ValueError):
    """Bad input, configuration or data; the command line prints it as one line and exits with 2."""


class UserNotice(UserWarning):
    """What a user should know but need not mend; the command line prints it as one line."""
