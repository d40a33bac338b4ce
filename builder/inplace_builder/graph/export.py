"""Exporting with torch.export: a module, or a graph again after it was rewritten.

torch.export assumes what a model's code asks of an extent, such as whether there is more than one
token. If what it assumed does not hold for every value, it fails, and names the extent only;
`named_extents` names the model's line too. `size_oblivious`, `LengthIndependent` and `correct_lstm`
keep PyTorch from asking, or from tracing wrongly, where the model is right.
"""

import contextlib
import itertools
import linecache
import re
import sys
import sysconfig
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import inplace
import sympy
import torch
from torch import Tensor
from torch._decomp import decompositions
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    guard_or_false,
)
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import copy_graph
from inplace_builder.graph.value_independent import ValueIndependent

MAX_VALUES = 64
"""Values of an extent that are tried, beside its largest one."""

MAX_NAMED = 2
"""Lines that an error names."""

_EXPORT = f"{Path(str(torch.__file__)).parent}/export/"
"""The folder of torch.export: what calls it is not a model's line either."""

_FOREIGN = tuple(
    f"{folder}/"
    for folder in (
        Path(str(torch.__file__)).parent,
        Path(inplace.__file__).parent,
        Path(__file__).parents[1],
    )
)
"""The folders of files that are not model's."""

_STANDARD = f"{sysconfig.get_path('stdlib')}/"
"""The folder of Python's own files; packages may be in it."""


def export_module(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    dynamic_shapes: Any,
    kwargs: Mapping[str, Any] | None,
    *,
    batched: bool = False,
) -> ExportedProgram:
    """Export a module as it is; copy an exported program, because lifting changes it.

    A copy has the same tensors.

    Args:
        module, example_inputs, dynamic_shapes, kwargs: as ``torch.export.export`` takes them.
        batched: write a line that asks for a tensor's value with the tensor itself, where that can
            be done. Otherwise only where torch.export cannot capture the line.

    Raises:
        BuildError: torch.export cannot capture the module.
    """
    if isinstance(module, ExportedProgram):
        return _copy_program(module)
    failures: list[Exception] = []
    asking: list[ExportedProgram] = []
    # size-oblivious, so that an extent of 1 may vary; a position that is passed as a Python number
    # needs the usual rules
    modes: tuple[_Mode, ...] = (size_oblivious, nullcontext)
    # the others only where a line asks for a tensor's value: every other module stays as it is
    for values, mode in itertools.product((nullcontext, ValueIndependent), modes):
        if asking and values is nullcontext:
            continue
        try:
            with mode(), values():
                exported = _exported(module, example_inputs, dynamic_shapes, kwargs)
        except Exception as error:
            failures.append(error)
            continue
        if not batched or values is ValueIndependent or not _asks_for_values(exported):
            return exported
        asking.append(exported)
    if asking:
        return asking[0]
    hint = example_hint(example_inputs) if dynamic_shapes else ""
    text = str(failures[-1])
    if isinstance(failures[-1], GuardOnDataDependentSymNode | DataDependentOutputException):
        text = (
            f"{text.splitlines()[0]}{failing_line(failures[-1])}: what the line does depends on a "
            f"tensor's value; index and calculate with the tensor itself, as x[:, n] * n, and "
            f"choose with torch.where instead of a branch"
        )
        raise BuildError(
            f"torch.export cannot capture {type(module).__name__}: {text}"
        ) from failures[-1]
    line = "" if "File " in text else failing_line(failures[-1])
    raise BuildError(
        f"torch.export cannot capture {type(module).__name__}: {text}{line}{hint}"
    ) from failures[-1]


_Mode = Callable[[], AbstractContextManager[Any]]


def _exported(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    dynamic_shapes: Any,
    kwargs: Mapping[str, Any] | None,
) -> ExportedProgram:
    """Export a module once."""
    with (
        torch.no_grad(),
        correct_lstm(),
        masks_as_given(),
        distributions_as_given(),
        warnings.catch_warnings(),
        named_extents(),
        assigned_buffers(module),
    ):
        warnings.simplefilter("ignore")
        return torch.export.export(
            module, tuple(example_inputs), dict(kwargs or {}), dynamic_shapes=dynamic_shapes
        )


def _asks_for_values(exported: ExportedProgram) -> bool:
    """Whether a graph asks for the value of a tensor."""
    asking = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
    return any(node.target in asking for node in exported.graph.nodes)


def example_hint(example_inputs: Sequence[Any]) -> str:
    """What may be wrong with example inputs of which an extent varies, to append to an error."""
    tensors = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(list(example_inputs))
        if isinstance(leaf, Tensor)
    ]
    if not any(extent == 1 for tensor in tensors for extent in tensor.shape):
        return ""
    return (
        "; if an extent that varies is 1 in the example, give it 2 entries or more: torch.export "
        "often takes a 1 for a constant"
    )


def _copy_program(program: ExportedProgram) -> ExportedProgram:
    return ExportedProgram(
        root=program.graph_module,
        graph=copy_graph(program.graph),
        graph_signature=deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def copy_module(module: GraphModule) -> GraphModule:
    """A copy of the graph over the same tensors, to keep while the first is rewritten."""
    return GraphModule(module, copy_graph(module.graph))


def without_unused_attributes(module: GraphModule) -> GraphModule:
    """The same graph, with only the attributes that it still uses.

    A mask that became a part of `inplace::attention` then needs no memory.
    """
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return GraphModule(
        {target: torch.fx.graph_module._get_attr(module, target) for target in used}, module.graph
    )


class InterpretedModule(torch.nn.Module):
    """Runs a graph node by node, so that an export of it keeps the model's source lines."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.body = graph_module

    def forward(self, *arguments: Any) -> Any:
        """Run the graph."""
        with torch.fx.traceback.preserve_node_meta():
            return Interpreter(self.body).run(*arguments)


def rename_inputs(exported: ExportedProgram, names: Sequence[str]) -> None:
    """Give the placeholders these names, in place: a variadic ``forward`` loses them.

    Another node that has one of the names gets a new one.
    """
    signature, nodes = exported.graph_signature, {node.name: node for node in exported.graph.nodes}
    inputs = [nodes[name] for name in signature.user_inputs]

    def rename(node: Node, new: str) -> None:
        signature.replace_all_uses(node.name, new)
        for spec in signature.input_specs:
            if spec.arg.name == node.name:
                spec.arg.name = new
        node.name = new
        if node.op == "placeholder":
            node.target = new

    suffixes = (f"_{number}" for number in itertools.count())
    taken = {*nodes, *names}
    for node in nodes.values():
        if node.name in names:
            free = (node.name + suffix for suffix in suffixes if node.name + suffix not in taken)
            rename(node, next(free))
    for node, name in zip(inputs, names, strict=True):
        rename(node, name)
    exported.graph_module.recompile()


def size_oblivious() -> contextlib.AbstractContextManager[None]:
    """Export without special treatment of extents 0 and 1: one graph for one row and for many."""
    config: Any = torch.fx.experimental._config
    patched: contextlib.AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


class LengthIndependent(TorchFunctionMode):
    """Export shape changes and products of packed tokens without a guard on their number.

    Where a tensor is not contiguous, PyTorch 2.11 asks whether it has one token only, in spite of
    `size_oblivious`. Here it is copied first, without the question.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a call of torch."""
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("reshape", "flatten", "contiguous", "linear") and not options:
            return func(_contiguous(args[0]), *args[1:])
        if name in ("matmul", "__matmul__") and not options:
            matrix, tokens = args
            if matrix.dim() == 2 and tokens.dim() == 3:
                return torch.nn.functional.linear(_contiguous(tokens.mT), matrix).mT
            if max(matrix.dim(), tokens.dim()) > 3 and min(matrix.dim(), tokens.dim()) > 2:
                return func(_contiguous(matrix), _contiguous(tokens))
        return func(*args, **options)


def _contiguous(x: Tensor) -> Tensor:
    """A tensor that is contiguous for every number of tokens: itself, or a copy."""
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if isinstance(size, int) and size == 1:
            continue
        if not guard_or_false(stride == expected):
            return x.clone(memory_format=torch.contiguous_format)
        expected = expected * size
    return x


@contextlib.contextmanager
def correct_lstm() -> Iterator[None]:
    """Trace ``lstm`` with last states of the right rank.

    The decomposition of PyTorch 2.11 squeezes the batch's axis of the last states instead of the
    axis that it added in front. Where the batch has several rows they keep the added axis, and what
    a model computes from them gets a wrong shape.
    """
    module: Any = decompositions
    original = module.one_layer_lstm
    module.one_layer_lstm = _one_layer_lstm
    try:
        yield
    finally:
        module.one_layer_lstm = original


def _one_layer_lstm(
    x: Tensor,
    hidden: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One direction of one layer of an LSTM.

    Args:
        x: ``[time, batch, features]``.
        hidden: the first states, ``[batch, hidden]``.
        params: the weights of the input and the hidden state, then their biases if there are any,
            then the projection if there is one.
        has_biases: whether there are biases.
        reverse: whether it goes from the last time to the first.

    Returns:
        The outputs, ``[time, batch, hidden]``, and the last states, ``[batch, hidden]``.
    """
    biases = params[2:4] if has_biases else (None, None)
    projection = params[-1] if len(params) % 2 else None
    steps = torch.nn.functional.linear(x, params[0], biases[0]).unbind(0)
    state, outputs = hidden, []
    for step in reversed(steps) if reverse else steps:
        state = decompositions.lstm_cell(
            step, *state, params[1], biases[1], projection, chunk_dim=1
        )
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """Export `nn.TransformerEncoder` and decoder without a look at their masks' values.

    They compare a mask with a causal one to choose a kernel. The mask says the same without it.
    """
    module: Any = torch.nn.modules.transformer
    original = module._detect_is_causal_mask
    module._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        module._detect_is_causal_mask = original


@contextlib.contextmanager
def distributions_as_given() -> Iterator[None]:
    """Export `torch.distributions` without a look at the values of their parameters."""
    distribution: Any = torch.distributions.Distribution
    original = distribution._validate_args
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        distribution.set_default_validate_args(original)


@dataclass(frozen=True)
class Assumption:
    """What an export assumed of one extent.

    Attributes:
        condition: for example ``input_ids.shape[0] != 1``.
        minimum, maximum: the values that the extent may have; no maximum if None.
        line: the model's, as `inplace_builder.graph.nodes.source_line` gives it.
    """

    condition: str
    minimum: int
    maximum: int | None
    line: str


class ExtentError(Exception):
    """A model's code fixes an extent that varies.

    Args:
        assumptions: what the export assumed of extents.
    """

    def __init__(self, assumptions: list[Assumption]) -> None:
        super().__init__(_text(assumptions))
        self.assumptions = assumptions


@contextlib.contextmanager
def named_extents() -> Iterator[None]:
    """Let an export that fails because an extent does not vary name the lines of the model.

    Raises:
        ExtentError: the export made an assumption that does not hold for every value of an extent.
    """
    assumptions: dict[Assumption, None] = {}
    original: Any = ShapeEnv._log_guard

    def noted(env: ShapeEnv, prefix: str, guard: Any, forcing_spec: bool) -> None:
        if prefix == "eval" and (assumption := _assumption(env, guard, sys._getframe(1))):
            assumptions[assumption] = None
        original(env, prefix, guard, forcing_spec)

    environment: Any = ShapeEnv
    environment._log_guard = noted
    try:
        yield
    except Exception as error:
        if not assumptions or "Constraints violated" not in str(error):
            raise
        raise ExtentError(list(assumptions)) from error
    finally:
        environment._log_guard = original


def _assumption(env: ShapeEnv, guard: Any, frame: FrameType | None) -> Assumption | None:
    """What a guard on one extent assumes; None if it always holds, or if no model asks it."""
    if len(guard.free_symbols) != 1 or not (line := model_line(frame)):
        return None
    (symbol,) = guard.free_symbols
    limits = env.var_to_range[symbol]
    minimum = int(limits.lower) if limits.lower.is_Integer else 0
    maximum = int(limits.upper) if limits.upper.is_Integer else None
    end = min(minimum + MAX_VALUES, minimum + MAX_VALUES if maximum is None else maximum)
    tried = [*range(minimum, end + 1), *([] if maximum is None else [maximum])]
    if all(guard.subs(symbol, value) == sympy.true for value in tried):
        return None
    sources = env.var_to_sources.get(symbol)
    name = _extent_name(sources[0].name) if sources else str(symbol)
    named = guard.subs(symbol, sympy.Symbol(name, integer=True))
    relation = getattr(named, "rel_op", None)
    condition = f"{named.lhs} {relation} {named.rhs}" if relation else str(named)
    return Assumption(condition, minimum, maximum, line)


def _extent_name(source: str) -> str:
    """``input_ids.shape[0]`` for ``L['input_ids'].size()[0]``."""
    source = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    return source.replace(".size()", ".shape")


def model_line(frame: FrameType | None) -> str:
    """The innermost line outside PyTorch and this project; empty if there is none."""
    while frame is not None:
        code, number = frame.f_code, frame.f_lineno
        file = code.co_filename
        if file.startswith(_EXPORT):
            return ""
        if not file.startswith((*_FOREIGN, "<")) and not _is_standard(file):
            text = linecache.getline(file, number).strip()
            return f' at "{file}", line {number}, in {code.co_name} ({text})'
        frame = frame.f_back
    return ""


def failing_line(error: BaseException) -> str:
    """The innermost line outside PyTorch and this project that was running when an error came."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return model_line(trace.tb_frame) if trace is not None else ""


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and "-packages" not in file.removeprefix(_STANDARD)


def _text(assumptions: list[Assumption]) -> str:
    named = " and ".join(f"{each.condition}{each.line}" for each in assumptions[:MAX_NAMED])
    first, more = assumptions[0], len(assumptions) - MAX_NAMED
    values = f"{first.minimum} or more" if first.maximum is None else f"up to {first.maximum}"
    return (
        f"the graph would be right only for {named}{f' and {more} more' if more > 0 else ''}; the "
        f"extent varies ({values}), so the line must do the same for every value"
    )


@contextlib.contextmanager
def assigned_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Let an export copy what a module assigns to its buffers, and those of its parts.

    ``self.hidden = new`` puts another tensor in a buffer's place. torch.export of PyTorch 2.11
    follows that in the root of a module only, and not where one of its buffers is None. Here the
    new tensors are copied into all of them, at the end of the graph.
    """
    tracing: Any = import_module("torch.export._trace")  # takes seconds, so only when needed
    original = tracing.register_buffer_assignment_hook
    assigned = _Assigned(module)
    tracing.register_buffer_assignment_hook = lambda *_: RemovableHandle(OrderedDict())
    before = module.register_forward_pre_hook(assigned.before, prepend=True)
    after = module.register_forward_hook(assigned.after)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        tracing.register_buffer_assignment_hook = original


class _Assigned:
    """Adds the copies to the graph while a module is traced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._places = [
            (part._buffers, name)
            for part in module.modules()
            for name, tensor in part._buffers.items()
            if tensor is not None
        ]
        self._held: list[tuple[dict[str, Tensor | None], str, Tensor, Node]] = []

    def before(self, *given: Any) -> None:
        """Note the tensors that are traced in the buffers' places."""
        mode = get_proxy_mode()
        self._held = []
        for buffers, name in self._places:
            tensor = buffers.get(name)
            node = None if tensor is None else _node(tensor, mode)
            if tensor is not None and node is not None:
                self._held.append((buffers, name, tensor, node))

    def after(self, *given: Any) -> None:
        """Copy the tensors that are there now into those."""
        mode = get_proxy_mode()
        changed = [
            (old, node, new)
            for buffers, name, old, node in self._held
            if isinstance(new := buffers.get(name), Tensor) and new is not old
        ]
        memory = {old.untyped_storage()._cdata for old, _, _ in changed}
        # what another copy writes, and an input, which has no line in the module
        fresh = [
            new.clone() if _is_input(new, mode) or new.untyped_storage()._cdata in memory else new
            for _, _, new in changed
        ]
        for (old, node, _), new in zip(changed, fresh, strict=True):
            source = _node(new, mode)
            if source is None:
                old.copy_(new)
            else:  # no call, as the extents may differ; the metadata tells that no line wrote it
                copy = node.graph.call_function(torch.ops.aten.copy_.default, (node, source))
                copy.meta = source.meta


def _is_input(tensor: Tensor, mode: Any) -> bool:
    node = _node(tensor, mode)
    return node is not None and node.op == "placeholder"


def _node(tensor: Tensor, mode: Any) -> Node | None:
    """The node of a tensor that is traced; None for another tensor."""
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node
