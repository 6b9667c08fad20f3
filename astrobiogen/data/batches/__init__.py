"""Samples in batches."""
