"""Triton's interpreter without what it repeats at every call; what it computes stays the same."""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def quicken():
    """Patch the language once; make each type of tile once.

    The interpreter searches all of `triton.language` for what to replace by NumPy, at each launch
    and again at each call of a device function. And it checks and names the type of each result,
    few of which differ.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing to restore
    interpreter._get_np_dtype = _kept(interpreter._get_np_dtype)
    tl.block_type.__init__ = _kept_types(tl.block_type.__init__)


def _kept(np_dtype):
    """The dtype of a type, looked up once for each name."""
    known = {}

    def lookup(kind):
        if kind.name not in known:
            known[kind.name] = np_dtype(kind)
        return known[kind.name]

    return lookup


def _kept_types(init):
    """The constructor of a tile's type, which copies an equal one where there is one."""
    known = {}

    def construct(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key in known:
            vars(self).update(known[key])
        else:
            init(self, element_ty, shape)
            known[key] = vars(self)

    return construct
