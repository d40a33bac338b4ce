"""TensorRT plugins of the operators; the states that they update are aliased outputs."""

from inplace.plugins.adapter import Plugins, plugins, register
from inplace.plugins.operations import (
    OPERATIONS,
    ArgmaxOperation,
    AttentionOperation,
    GroupedLinearOperation,
    Launch,
    LinearOperation,
    Operation,
    RmsNormOperation,
    SampleOperation,
    UpdateOperation,
)

__all__ = [
    "OPERATIONS",
    "ArgmaxOperation",
    "AttentionOperation",
    "GroupedLinearOperation",
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
