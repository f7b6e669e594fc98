"""What runs on the device: a lean backbone, its KV cache, one decode step, CUDA graphs."""
