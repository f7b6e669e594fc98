"""The kernel configurations that ship, one module an operation, named after its folder.

To add an operation, add a module here with a function ``cases()`` that yields a `Configuration` for
each form of its kernels that is launched: the reference size first (``is_main=True``, which the
tests compile for sm_90 and gfx942), then other dtypes, widths and options. The report finds the
module by itself.
"""
