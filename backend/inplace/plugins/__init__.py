"""TensorRT plugins of the operators; the states that they update are aliased outputs."""

from inplace.plugins.operations import (
    ArgmaxOperation,
    AttentionOperation,
    GroupedLinearOperation,
    LinearOperation,
    RmsNormOperation,
    SampleOperation,
    SampleOptionsOperation,
    UpdateOperation,
    WeightedSumOperation,
)
from inplace.plugins.plugin import OPERATIONS, Launch, Operation, Plugins, plugins, register
from inplace.plugins.recurrences import (
    CausalConv1dOperation,
    DeltaRuleOperation,
    LinearRecurrenceOperation,
    SelectiveScanOperation,
)

__all__ = [
    "OPERATIONS",
    "ArgmaxOperation",
    "AttentionOperation",
    "CausalConv1dOperation",
    "DeltaRuleOperation",
    "GroupedLinearOperation",
    "Launch",
    "LinearOperation",
    "LinearRecurrenceOperation",
    "Operation",
    "Plugins",
    "RmsNormOperation",
    "SampleOperation",
    "SampleOptionsOperation",
    "SelectiveScanOperation",
    "UpdateOperation",
    "WeightedSumOperation",
    "plugins",
    "register",
]
