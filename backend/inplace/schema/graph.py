"""The graph of a PyTorch engine, as its file holds it.

An engine file is a safetensors file: its tensors are the memory of the graph's constants, and its
metadata entry ``graph`` is a `GraphFile`. The file is data. `torch.export`'s own archive is not
used because reading one unpickles objects and evaluates expressions.

`inplace_builder.graph.writer` writes the files, `inplace.engines.graph_reader` reads them.
"""

import builtins
import math
import operator
import re
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from inplace.schema.files import Record
from inplace.schema.specs import Dtype, Extent

FORMAT: Literal[1] = 1

METADATA = "graph"
"""The metadata entry that holds the graph."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,999}\Z")
"""The names of inputs, constants, branches and results."""

MAX_NESTING = 16
"""Graphs inside graphs, and lists inside lists."""

_DTYPE_NAMES = """
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64
    float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
    float16 bfloat16 float32 float64 complex32 complex64 complex128
"""

CONSTANT_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _DTYPE_NAMES.split()
}
"""The element types of constants, and of arguments that are types; by PyTorch's names."""

LAYOUTS = {"strided": torch.strided}
"""Layouts that may be arguments, by PyTorch's names."""

MEMORY_FORMATS = {
    name: getattr(torch, name)
    for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
"""Memory formats that may be arguments, by PyTorch's names."""

_FUNCTION_NAMES: tuple[tuple[ModuleType, int, str], ...] = (
    (operator, 2, "add sub mul truediv floordiv mod pow lshift rshift eq ne lt le gt ge and_ or_"),
    (operator, 2, "getitem"),
    (operator, 1, "neg pos not_"),
    (torch, 1, "sym_float sym_int sym_not sym_sum _sym_sqrt"),
    (torch, 2, "sym_max sym_min"),
    (torch, 3, "sym_ite"),
    (math, 1, "ceil floor trunc"),
    (builtins, 1, "round"),
    (builtins, 2, "max min"),
)

FUNCTIONS: dict[str, tuple[Any, int]] = {
    f"{module.__name__}.{name}": (getattr(module, name), arity)
    for module, arity, names in _FUNCTION_NAMES
    for name in names.split()
}
"""Python functions of numbers, from which a graph computes extents; and how many they take."""

BRANCHES: dict[str, tuple[int, ...]] = {
    "cond": (1, 2),
    "while_loop": (0, 1),
    "map_impl": (0,),
    "scan": (0,),
    "wrap_with_set_grad_enabled": (1,),
    "wrap_with_autocast": (4,),
}
"""Operators of ``torch.ops.higher_order`` that a graph may call, and the arguments that are graphs.
"""

_DENIED = """
    _c10d_functional _c10d_functional_autograd _dtensor _inductor_test _quantized _test c10d
    c10d_functional debug_mode_ops debugprims export flex_lib fsdp higher_order image inductor mkl
    mkldnn mkldnn_prepacked onednn onnx onnx_symbolic prepacked prim profiler quantization quantized
    rngprims sparse static_runtime symm_mem torchaudio torchcodec_ns
"""

DENIED_NAMESPACES = frozenset(_DENIED.split())
"""Operator libraries that PyTorch and its companions bring and no captured graph calls.

Among them are operators for files, for communication with other processes and for custom objects.
Every other library is one that the process itself registered: the user's own.
"""

_UNCHECKED = """
    _reshape_alias _reshape_alias_copy set set_ set_data resize resize_ resize_as resize_as_
    _resize_output _resize_output_ resize_as_sparse resize_as_sparse_
"""

DENIED_OPERATORS = frozenset(
    {"aten::from_file", "aten::_print", "inplace::execute"}
    | {f"aten::{name}" for name in _UNCHECKED.split()}
)
"""Operators that reach outside the graph: a file, the terminal, an engine inside the engine, and
memory outside of a tensor, because they compare no sizes."""

DENIED_PREFIXES = ("aten::_sparse", "aten::sparse_", "aten::_nested", "aten::_validate_sparse")
"""Constructors of tensors whose indices are not compared with their sizes."""


class GraphPart(Record):
    """A part of a graph file; read without conversions."""

    model_config = ConfigDict(strict=True)


class GraphTensor(GraphPart):
    """A constant: a typed, strided view of memory, so that tied weights stay tied.

    Attributes:
        storage: the tensor of the file that holds its memory.
        dtype: element type, one of `CONSTANT_DTYPES`.
        shape, stride: in elements.
        offset: of the first element in the storage, in elements of ``dtype``.
    """

    storage: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class GraphValue(GraphPart):
    """A value that a graph takes or returns.

    Attributes:
        name: of the input, or of the node that is returned; empty for a returned constant.
        dtype: element type; None for a Python number, and in the graphs of branches.
        shape: extents; a number has its own value or expression as the only one. Empty in the
            graphs of branches.
        value: of a returned constant, encoded as an argument of `GraphNode`.
    """

    name: str = ""
    dtype: Dtype | None = None
    shape: tuple[Extent, ...] = ()
    value: Any = None


class GraphNode(GraphPart):
    """One call.

    Numbers, texts, booleans, None and lists are arguments as they are. Another argument is an
    object of one entry: ``node`` (a result, constant, input or branch by name), ``float`` (not
    finite), ``complex``, ``dtype``, ``device``, ``layout``, ``memory_format`` or ``slice``.

    Attributes:
        name: of its result.
        target: an operator as ``namespace::name.overload``, a key of `FUNCTIONS`, or
            ``higher_order::`` and a key of `BRANCHES`.
        args: positional arguments.
        kwargs: named arguments.
    """

    name: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)


class GraphRecord(GraphPart):
    """A graph. Every name is used once in it.

    Attributes:
        inputs: in the order in which they are passed.
        constants: by the name under which the nodes read them.
        branches: graphs that operators such as ``cond`` call, by name.
        nodes: in the order in which they are computed.
        outputs: in the order in which they are returned.
        returns: whether a tuple or the one value itself is returned.
    """

    inputs: tuple[GraphValue, ...]
    constants: dict[str, GraphTensor] = Field(default_factory=dict)
    branches: dict[str, "GraphRecord"] = Field(default_factory=dict)
    nodes: tuple[GraphNode, ...]
    outputs: tuple[GraphValue, ...]
    returns: Literal["tuple", "value"] = "tuple"


class GraphFile(GraphPart):
    """The metadata entry of an engine file.

    Attributes:
        format: version of this encoding.
        graph: the program.
        ranges: smallest and largest value of each symbol in the shapes of the inputs; None is no
            limit.
    """

    format: Literal[1] = FORMAT
    graph: GraphRecord
    ranges: dict[str, tuple[int | None, int | None]] = Field(default_factory=dict)


def may_call(namespace: str, name: str) -> bool:
    """Whether a graph may call the operator ``namespace::name``, if it is registered."""
    full = f"{namespace}::{name}"
    return (
        namespace not in DENIED_NAMESPACES
        and full not in DENIED_OPERATORS
        and not full.startswith(DENIED_PREFIXES)
    )
