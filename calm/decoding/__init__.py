"""Generation: prompts, temperature, and the loop that draws chunk after chunk."""

from calm.decoding.engine import Generation, generate

__all__ = ["Generation", "generate"]
