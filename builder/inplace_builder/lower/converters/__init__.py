"""Converters of PyTorch's own operators."""
