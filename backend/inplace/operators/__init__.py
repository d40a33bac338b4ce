"""The operators of a graph.

Some of them are the only way a captured graph touches state: `read` and `update`; `attention` on
keys and values; `causal_conv1d`, `selective_scan`, `delta_rule` and `linear_recurrence` on states
of fixed size. Each takes the whole arena tensor ``[slots, ...]`` and the slots of the step's rows,
so one graph serves any rows in any slots. All but `read` mutate it in place, so no state is an
output that must be copied back. `sample` chooses each row's next token, `grouped_linear` computes a
mixture's experts and `weighted_sum` adds them. Lowering fuses neighbours into `linear`, `argmax`
and ``qkv_attention``.

Importing this package registers all of them as ``torch.ops.inplace.*``.
"""

from inplace.operators import rotary_attention  # noqa: F401 - registers its operators
from inplace.operators.attention import attention
from inplace.operators.convolution import causal_conv1d
from inplace.operators.grouped_linear import grouped_linear, weighted_sum
from inplace.operators.library import NAMESPACE
from inplace.operators.linear import ACTIVATIONS, linear
from inplace.operators.recurrence import delta_rule, linear_recurrence, selective_scan
from inplace.operators.sample import SampledTokens, argmax, sample, sample_with_options
from inplace.operators.state import read, update, written_states

__all__ = [
    "ACTIVATIONS",
    "NAMESPACE",
    "SampledTokens",
    "argmax",
    "attention",
    "causal_conv1d",
    "delta_rule",
    "grouped_linear",
    "linear",
    "linear_recurrence",
    "read",
    "sample",
    "sample_with_options",
    "selective_scan",
    "update",
    "weighted_sum",
    "written_states",
]
