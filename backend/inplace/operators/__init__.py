"""The operators of a graph.

Three of them, `read`, `update` and `attention`, are the only way a captured graph touches state. Each takes the whole arena tensor
``[slots, ...]`` and the slots of the step's rows, so the same graph serves any rows in any slots, and mutates in place, so no state
is ever an output that must be copied back. `sample` chooses each row's next token. Lowering fuses neighbours into `linear`, `argmax`
and `qkv_attention`.

Importing this package registers all of them as ``torch.ops.inplace.*``.
"""

from inplace.operators import attention as qkv_attention  # noqa: F401  registers what only lowering calls
from inplace.operators.attention import attention
from inplace.operators.library import NAMESPACE, written_states
from inplace.operators.linear import ACTIVATIONS, argmax, linear
from inplace.operators.sample import sample
from inplace.operators.state import read, update

__all__ = [
    "ACTIVATIONS",
    "NAMESPACE",
    "argmax",
    "attention",
    "linear",
    "read",
    "sample",
    "update",
    "written_states",
]
