"""Using a model: weights loaded for inference, keys and values kept from token to token, tokens chosen."""
