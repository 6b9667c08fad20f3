"""Kernels against plain PyTorch, from single operators to training curves: `python -m astrobiogen.validate`."""
