"""The autoencoder, the language models on top of it and the token baseline."""
