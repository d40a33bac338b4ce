"""TensorRT plugins: the operators of a graph as TensorRT runs them, their states aliased outputs."""

from inplace.plugins.adapter import OPERATIONS, Plugins, plugins, register
from inplace.plugins.linear import ArgmaxOperation, LinearOperation, RmsNormOperation
from inplace.plugins.operation import Launch, Operation
from inplace.plugins.sample import SampleOperation
from inplace.plugins.state import AttentionOperation, UpdateOperation

__all__ = [
    "OPERATIONS",
    "ArgmaxOperation",
    "AttentionOperation",
    "Launch",
    "LinearOperation",
    "Operation",
    "Plugins",
    "RmsNormOperation",
    "SampleOperation",
    "UpdateOperation",
    "plugins",
    "register",
]
