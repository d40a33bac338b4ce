"""Converters of PyTorch's own operators; importing this package registers them."""

from importlib import import_module

for _name in (
    "arithmetic",
    "functions",
    "indexing",
    "logic",
    "matrix",
    "normalization",
    "placing",
    "reduction",
    "shape",
):
    import_module(f"{__name__}.{_name}")
