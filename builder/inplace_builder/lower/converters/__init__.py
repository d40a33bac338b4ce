"""Converters of PyTorch's own operators; importing this package registers them."""

from inplace_builder.lower.converters import elementwise as elementwise
from inplace_builder.lower.converters import indexing as indexing
from inplace_builder.lower.converters import matrix as matrix
from inplace_builder.lower.converters import normalization as normalization
from inplace_builder.lower.converters import reduction as reduction
from inplace_builder.lower.converters import shape as shape
