"""TensorRT plugins: the operators of a graph as TensorRT runs them, their states aliased outputs."""

from inplace.plugins.adapter import OPERATIONS, Plugins, plugins, register
from inplace.plugins.linear import Argmax, Linear, RmsNorm
from inplace.plugins.operation import Launch, Operation
from inplace.plugins.sample import Sample
from inplace.plugins.state import Attention, Update

__all__ = [
    "OPERATIONS",
    "Argmax",
    "Attention",
    "Launch",
    "Linear",
    "Operation",
    "Plugins",
    "RmsNorm",
    "Sample",
    "Update",
    "plugins",
    "register",
]
