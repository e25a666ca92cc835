"""From text to micro-batches.

prepare makes a corpus; corpus writes and reads it; index says which tokens are sample i; samples, batch, loader and
prefetch hand them to a rank. Only batch, loader and prefetch import torch.
"""
