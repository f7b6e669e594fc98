"""The text of a run, and how its blocks reach the processes."""
