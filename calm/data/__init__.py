"""Documents, tokenizers and packing."""
