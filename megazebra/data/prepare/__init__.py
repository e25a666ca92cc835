"""From text and conversations to corpora, and back: inputs, tokenizers, encoding. For the tools, not for training."""
