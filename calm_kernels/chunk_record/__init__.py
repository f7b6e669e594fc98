"""The record of a decoded chunk, in one launch."""

from calm_kernels.chunk_record.api import chunk_record

__all__ = ["chunk_record"]
