"""Runs that are started again when they end before their last step. Imports no torch."""
