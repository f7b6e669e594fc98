"""Device time of the kernels and of their baselines on a GPU.

To add an operation, add a module here that is named after its folder in calm_kernels, with

* ``Shape``, a frozen dataclass whose defaults are the reference size, and the lists ``SHAPES`` and
  ``QUICK`` of what is measured;
* ``works(shapes, device="cuda")``, which asserts parity at a shape and then yields a `Work` (of
  work.py) for the kernel and each of its baselines.

run.py finds the module by its name.
"""
