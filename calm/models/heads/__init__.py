"""Generative heads: hidden states to draws of the next latent, and the losses that train them."""
