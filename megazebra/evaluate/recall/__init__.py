"""Tasks whose answer stands somewhere in the text: token-level for tiny models, and in words."""
