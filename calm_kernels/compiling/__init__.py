"""Compiles kernels for GPUs that this machine need not have, and reads the compiled code."""
