"""Comparison with a float64 truth, and what an operation allocates or keeps."""

import mmap

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A few roundings in the dtype of the result, as a relative error: where the plain formula is exact
# by luck, another order of summation need not be. float32 4 eps, the 16-bit types half of one (one
# rounding), float64 450 eps, since its truth is rounded as often.
ROUNDING = {
    torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4
}  # fmt: skip


def sparse_memory(count, dtype):
    """`count` elements of which only those that are written take memory, poisoned or not."""
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


def relative_error(actual, truth):
    """Norm of the difference over the norm of the truth (over 1 where the truth is zero)."""
    norm = truth.norm()
    return float((actual.double() - truth.double()).norm() / (norm if norm > 0 else 1.0))


def assert_no_worse_than_plain(actual, plain, truth):
    """Each result is as near to its float64 truth as the plain formula in the same dtype.

    Allowed is twice the error of the plain formula (sums may run in another order) and `ROUNDING`.
    """
    assert len(actual) == len(plain) == len(truth)
    for index, (ours, theirs, exact) in enumerate(zip(actual, plain, truth, strict=True)):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype, index
        assert torch.isfinite(ours).all(), index
        allowed = 2 * relative_error(theirs, exact) + ROUNDING[ours.dtype]
        assert relative_error(ours, exact) <= allowed, f"result {index}"


def leaf(tensor, dtype=None):
    """A copy that collects its own gradient."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


class LargestOutput(TorchDispatchMode):
    """Elements of the largest tensor that an operation made in the block; views do not count."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [value.numel() for value in tree_leaves(result) if torch.is_tensor(value)]
            self.numel = max([self.numel, *sizes])
        return result


def saved_bytes(function):
    """Bytes that the autograd graph of ``function()`` keeps, each storage counted once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result
