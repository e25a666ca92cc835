"""Texts to token ids: tokenizers and the libraries that run them."""
