"""Synthetic long question answering: facts planted in long texts, questions about them, as conversations."""
