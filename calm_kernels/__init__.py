"""Fused operations for continuous autoregressive language models."""
