"""Corpora on disk: Megatron's `.bin`/`.idx` and our sidecar, written, read and verified."""
