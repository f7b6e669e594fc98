"""Generation: prompts, sampling methods, and the loop that draws chunk after chunk."""

from calm.decoding.engine import generate, warmup
from calm.decoding.result import Generation

__all__ = ["Generation", "generate", "warmup"]
