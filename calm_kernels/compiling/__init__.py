"""Compiling kernels for machines that are not here, and reading what the compiler made of them."""
