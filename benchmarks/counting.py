"""Counts what launches work on a GPU, without one.

Kernels of ours count one launch each and do nothing. Every other operation of torch counts as one,
though the library may need several kernels for it; views and allocations count none.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["REST", "Launches", "OnCuda", "restored"]

REST = "rest"
# Operations that return a view, or memory without contents.
FREE = """
_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand
imag lift_fresh new_empty new_empty_strided permute real select slice split split_with_sizes squeeze
t transpose unbind unfold unsqueeze view view_as_complex view_as_real
"""
HOST_READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "nonzero"})
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Launches(TorchDispatchMode):
    """Counts launches by part; operations of a backward pass belong to the part of their forward.

    Attributes:
        counts: launches of each part.
        names: operations that were counted.
        host_reads: operations that wait for the device.
        casts: of each weight to another dtype, by name.

    Args:
        stub: stands for our kernels.
        weights: by name, whose casts are counted.
    """

    def __init__(
        self, stub: Any, weights: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self.casts: Counter[str] = Counter()
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}
        self._stub, self._seen = stub, stub.count
        self.counts: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self.host_reads: list[str] = []
        self._part = REST
        self._began = [0]  # numbers of autograd's nodes at which parts begin
        self._parts = [REST]

    def watch(self, owner: Any, name: str, part: str) -> None:
        """What the function `name` of `owner` does from now on belongs to `part`."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self._part
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.begin(before)

        setattr(owner, name, watched)

    def begin(self, part: str) -> None:
        """What follows belongs to `part`."""
        self._part = part
        self._began.append(torch._C._autograd._get_sequence_nr())
        self._parts.append(part)

    def count(self, name: str) -> None:
        """One launch, and those of our kernels since the last."""
        part = self._current_part()
        self.counts[part] += 1
        self.names[part, name] += 1
        self._count_kernels(part)

    def _count_kernels(self, part: str) -> None:
        self.counts[part] += self._stub.count - self._seen
        self.names[part, "kernels of ours"] += self._stub.count - self._seen
        self._seen = self._stub.count

    def __exit__(self, *error: Any) -> None:
        self._count_kernels(self._current_part())  # after which no operation came
        super().__exit__(*error)

    def _current_part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._part
        if node.name().endswith("AccumulateGrad"):
            return "adding gradients up"
        return self._parts[bisect_right(self._began, node._sequence_nr()) - 1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        kwargs = kwargs or {}
        if namespace == "calm_kernels":
            with self:  # what it does is counted, on any device
                result = function.redispatch(CPU_KEYS, *args, **kwargs)
            self._count_kernels(self._current_part())
            return result
        has_own = function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU)
        if function.has_kernel_for_dispatch_key(COMPOSITE) and not has_own:
            with self:  # inside the operators above, where autograd does not take it apart
                return function.decompose(*args, **kwargs)
        if name in HOST_READS:
            self.host_reads.append(name)
        elif name not in FREE.split() and namespace == "aten":
            self.count(name)
        if name == "_to_copy" and (weight := self._names.get(args[0].data_ptr())):
            self.casts[weight] += 1
        return function(*args, **kwargs)


class OnCuda(TorchFunctionMode):
    """Attention and norms as CUDA has them: a launch each, norms in float32 under autocast."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            self.launches.count("scaled_dot_product_attention")
            return args[0].new_empty(args[0].shape)
        if function is F.rms_norm:  # whose pieces a CPU runs one by one
            return F.layer_norm(*args, kwargs["weight"], None, kwargs["eps"])
        if function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


@contextmanager
def restored(module: Any, name: str) -> Iterator[None]:
    """`module` has its own function of this name again after the block."""
    function = getattr(module, name)
    try:
        yield
    finally:
        setattr(module, name, function)
