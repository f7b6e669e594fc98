"""Whole checkpoints, and what a run that goes on is compared with."""
