"""Adapters between these models and tools of the field, each with an extra of its own."""
