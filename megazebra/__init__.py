"""MegaZebra: a trainer for long-context local-global language models."""

__version__ = "0.1.0"
