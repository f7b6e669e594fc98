"""Whole experiments: the demo, and the temperature study."""
