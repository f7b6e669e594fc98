"""Continuous autoregressive language models."""
