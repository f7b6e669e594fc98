"""One run at a time in an output folder: a lock that ends with its process, however that ends."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from calm.errors import UserError

__all__ = ["LOCK", "locked"]

logger = logging.getLogger(__name__)

LOCK = ".lock"
# The operating system's locks are those of a process: it would give one of its own out twice.
_held: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; it is made, and removed again if nothing was written to it.

    The lock is the operating system's: one whose process was killed is free at once. The file names
    host and process for the message alone.

    Raises:
        UserError: another run holds it.
    """
    path = folder.resolve() / LOCK
    made = _make(folder)
    handle = _acquire(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        if handle is not None:
            path.unlink(missing_ok=True)  # before it is free: nobody can hold a file without a name
            handle.close()
        for empty in made:
            try:
                empty.rmdir()
            except OSError:  # it holds something
                break


def _make(folder: Path) -> list[Path]:
    """Make `folder`; what was made, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(path: Path) -> IO[str] | None:
    """The locked file, to be kept open; None where the file system has no locks."""
    while path not in _held:
        handle = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                handle.truncate(0)
                handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
                handle.flush()
                return handle
            handle.close()  # the run that held it has just ended and removed it
        except OSError as error:
            handle.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                break
            logger.warning("%s cannot be locked (%s): start no second run there", path, error)
            return None
    raise UserError(
        f"output_dir: another run is writing to {path.parent} ({_owner(path)}); wait for it, stop "
        "it, or choose another folder"
    )


def _owner(path: Path) -> str:
    if path in _held:  # not read: closing the file once would free the lock
        return "this process"
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {path}"
