"""The operators of a graph.

Three of them, `read`, `update` and `attention`, are the only way a captured graph touches state.
Each takes the whole arena tensor ``[slots, ...]`` and the slots of the step's rows, so one graph
serves any rows in any slots. `update` and `attention` mutate it in place, so no state is an output
that must be copied back. `sample` chooses each row's next token, `grouped_linear`
computes a mixture's experts. Lowering fuses neighbours into `linear`, `argmax` and
``qkv_attention``.

Importing this package registers all of them as ``torch.ops.inplace.*``.
"""

from inplace.operators.attention import attention
from inplace.operators.grouped_linear import grouped_linear
from inplace.operators.library import NAMESPACE, written_states
from inplace.operators.linear import ACTIVATIONS, linear
from inplace.operators.sample import argmax, sample
from inplace.operators.state import read, update

__all__ = [
    "ACTIVATIONS",
    "NAMESPACE",
    "argmax",
    "attention",
    "grouped_linear",
    "linear",
    "read",
    "sample",
    "update",
    "written_states",
]
