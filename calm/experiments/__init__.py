"""Whole experiments: the demo, and what they share."""
