"""What a run measures, logs and watches."""
