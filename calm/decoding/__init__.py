"""Generation: prompts, sampling methods, and the loop that draws chunk after chunk."""

from calm.decoding.generation import generate, warmup
from calm.decoding.text.edges import TextStream
from calm.decoding.text.result import Generation

__all__ = ["Generation", "TextStream", "generate", "warmup"]
