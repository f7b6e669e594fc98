"""What the processes of a run find out together."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed
from transformers import TrainingArguments

from calm.errors import UserError

__all__ = ["agreed"]

Found = TypeVar("Found")


def agreed(args: TrainingArguments, work: Callable[[], Found]) -> Found:
    """What `work` returns in the first process, in all of them.

    An error of one is raised by all, so that none waits for another that has ended: without
    torchrun nothing would stop it.

    Args:
        args: of the run.
        work: called by every process.

    Raises:
        UserError: `work` raised it in some process; the first one's, if several did.
    """
    own: UserError | None = None
    value: Any = None
    try:
        value = work()
    except UserError as error:
        own = error
    if args.world_size > 1:
        found: list[Any] = [None] * args.world_size
        distributed.all_gather_object(found, (value, own and str(own)))
        value = found[0][0]
        others = (message for _, message in found if message is not None)
        message = next(others, None)
        own = own or (None if message is None else UserError(message))
    if own is not None:
        raise own
    return value
