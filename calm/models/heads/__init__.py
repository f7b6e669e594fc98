"""Generative heads: from a hidden state to draws of the next latent, and the loss that trains them."""
