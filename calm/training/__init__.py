"""Training of the three stages: autoencoder, language model, token-by-token baseline."""
