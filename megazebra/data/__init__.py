"""From text to micro-batches: corpora in Megatron's format, the order of samples, the loader.

text_files, tokenizer and preprocess make a corpus; indexed_corpus reads it; order says which tokens are sample i;
samples, batch and loader hand them to a rank. Only batch and loader import torch.
"""
