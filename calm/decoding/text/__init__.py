"""The text side of generation, on the host: prompts, stopping, what has been written so far."""
