"""What the host reads of a decoded chunk, and what the next step reads of it."""

from calm_kernels.chunk_record.api import advance_state, chunk_record

__all__ = ["advance_state", "chunk_record"]
