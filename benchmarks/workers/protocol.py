"""Commands to a worker process over pipes: one line of JSON for each command and each reply."""

import contextlib
import json
import os
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

__all__ = ["Worker", "WorkerError", "reply_channel", "serve"]

Handler = Callable[..., Any]


class WorkerError(RuntimeError):
    """A worker could not be started, stopped early, or failed at a command."""


def reply_channel() -> TextIO:
    """Standard output for replies alone: from now on, whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def serve(handlers: Mapping[str, Handler], commands: TextIO, replies: TextIO) -> None:
    """Answer commands until `commands` ends.

    A command is ``{"command": name, "options": {...}}``; the reply is ``{"result": ...}`` or
    ``{"error": text}``.
    """
    for line in commands:
        request = json.loads(line)
        try:
            reply = {"result": handlers[request["command"]](**request["options"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """A process that answers commands; use it in a ``with`` statement, which ends it.

    Args:
        name: for error messages.
        command: the command line of a process that calls `serve`.
        environment: its environment variables.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise WorkerError(f"{name}: cannot run {command[0]}: {error}") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def __call__(self, command: str, **options: Any) -> Any:
        """The result of one command.

        Raises:
            WorkerError: the command failed, or the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"command": command, "options": options}
        with contextlib.suppress(BrokenPipeError):  # then its output has ended too, see below
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name}: ended with exit code {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {command} failed\n{reply['error']}")
        return reply["result"]
