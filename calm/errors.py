"""Errors that a user can mend: what is wrong, where, and what to do next, in one message."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input, configuration or data; the command line prints it as one line and exits with 2."""
