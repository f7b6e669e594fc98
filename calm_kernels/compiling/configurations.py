"""All kernel configurations that ship, collected from `calm_kernels.compiling.cases`."""

import importlib
import pkgutil
from collections.abc import Iterator

from calm_kernels.compiling import cases
from calm_kernels.compiling.configuration import Configuration

__all__ = ["configurations"]


def configurations() -> Iterator[Configuration]:
    """Operation by operation, each module's in its own order."""
    for module in pkgutil.iter_modules(cases.__path__, cases.__name__ + "."):
        yield from importlib.import_module(module.name).cases()
