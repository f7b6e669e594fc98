"""Weights, gradients and optimizer states split among processes (FSDP 2)."""
