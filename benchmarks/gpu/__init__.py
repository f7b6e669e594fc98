"""Device time of the kernels and of their baselines on a GPU.

To add an operation, add a module here that is named after its folder in calm_kernels, with

* ``Shape``, a frozen dataclass whose defaults are the reference size, the lists ``SHAPES`` and
  ``QUICK`` of what is measured, and ``TINY``, two shapes for the interpreter;
* ``works(shapes, device="cuda", *, compiled=False)``, which asserts parity at a shape and yields a
  `Work` (of work.py) for the kernel and each ready baseline, or for those of torch.compile alone.

run.py finds the module by its name.
"""
