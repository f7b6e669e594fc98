"""Attention of one new chunk of each sequence over its cache of keys and values."""

from calm_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
