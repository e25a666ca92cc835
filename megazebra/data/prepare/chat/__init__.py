"""Conversations to text by a template, and to tokens with the spans that the assistant says."""
