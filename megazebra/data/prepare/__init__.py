"""From text and conversations to a corpus: inputs, tokenizers, encoding. Used by the tools, not by training."""
