"""Generation: prompts, temperature, and the loop that draws chunk after chunk."""

from calm.decoding.baseline import generate_tokens
from calm.decoding.engine import Generation, generate

__all__ = ["Generation", "generate", "generate_tokens"]
