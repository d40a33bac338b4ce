"""How a module was called, as the manifest of a directly called engine has it.

A user's module as torch.export has it, where the builder can work on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from inplace.errors import LoadError
from inplace.schema.dtypes import Dtype
from inplace.schema.standalone import Argument, CallSignature
from inplace.standalone.checks import ALIGNMENT
from inplace.standalone.torch_graph import dtype_and_shape, result_records, symbol_ranges
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.fx import Node
from torch.utils import _pytree as pytree

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.choices import EngineKind
from inplace_builder.errors import BuildError, brief
from inplace_builder.states.lift import export_module
from inplace_builder.states.state import CapturedState


def describe_call(exported: ExportedProgram, capture: ExportedCapture) -> CallSignature:
    """How the module was called, leaf by leaf."""
    args, named = exported.example_inputs
    signature = exported.module_call_graph[0].signature
    assert signature is not None and signature.in_spec is not None
    given = list(signature.forward_arg_names or ())
    parameters = (
        tuple(given)
        if len(given) == len(args) + len(named)
        else (*(f"argument_{i}" for i in range(len(args))), *named)
    )
    leaves = pytree.tree_flatten_with_path((args, named))[0]
    specs = [
        spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    ]
    if len(leaves) != len(specs):
        raise BuildError(
            f"torch.export took {len(specs)} of {len(leaves)} arguments; pass each tensor of a call as an argument of its own"
        )
    states = {state.tensor.module_tensor.name: state for state in capture.states}
    placeholders = {
        node.name: node for node in capture.exported.graph.nodes if node.op == "placeholder"
    }
    arguments: list[Argument] = []
    for (where, leaf), spec in zip(leaves, specs, strict=True):
        title = _title(where, parameters)
        if isinstance(spec.arg, ConstantArgument):
            if not isinstance(leaf, bool | int | float | str | None):
                raise BuildError(
                    f"argument {title} is a {type(leaf).__name__}; an engine takes tensors, numbers and constants"
                )
            arguments.append(Argument(where=title, kind="constant", value=leaf))
            continue
        state = states.get(spec.arg.name)
        value = leaf if state else placeholders[spec.arg.name].meta["val"]
        if isinstance(leaf, Tensor):
            kind: Literal["state", "tensor"] = "state" if state else "tensor"
            extents = (
                dtype_and_shape(value)[1] if state is None else _extents(leaf, state, placeholders)
            )
            arguments.append(
                Argument(
                    where=title,
                    name=spec.arg.name,
                    kind=kind,
                    dtype=dtype_of(leaf, title),
                    shape=extents,
                )
            )
        elif isinstance(value, torch.SymInt):
            arguments.append(
                Argument(
                    where=title, name=spec.arg.name, kind="number", shape=dtype_and_shape(value)[1]
                )
            )
        else:
            raise BuildError(
                f"argument {title} is a {type(leaf).__name__} that changes from call to call; pass a tensor"
            )
    try:
        trees = [pytree.treespec_dumps(tree) for tree in (signature.in_spec, signature.out_spec)]
    except Exception as error:
        raise BuildError(
            f"the arguments or outputs have a type that cannot be written ({brief(error)}): register it with a serialized_type_name "
            f"(torch.export.register_dataclass), or pass and return dicts and tuples"
        ) from error
    try:
        returned = result_records(capture.exported)
    except (LoadError, ValueError) as error:
        raise BuildError(
            f"an output cannot be returned by an engine: {brief(error)}; return tensors, numbers and constants"
        ) from error
    return CallSignature(
        arguments=tuple(arguments),
        ranges=symbol_ranges(capture.exported, [argument.shape for argument in arguments]),
        results=returned,
        in_spec=trees[0],
        out_spec=trees[1],
        parameters=parameters,
        positional=len(args),
    )


def _extents(
    tensor: Tensor, state: CapturedState, placeholders: Mapping[str, Node]
) -> tuple[int | str, ...]:
    """The extents of a tensor that is a state or is divided into some."""
    found: list[int | str] = list(tensor.shape)
    if state.tensor.dynamic_axes:  # then it is not divided
        in_slots = dtype_and_shape(placeholders[state.name].meta["val"])[1]
        for axis in state.tensor.dynamic_axes:
            found[axis] = in_slots[axis + (not state.has_slot_axis)]
    return tuple(found)


def _title(where: tuple[Any, ...], parameters: Sequence[str]) -> str:
    """The path of a leaf in ``(args, kwargs)`` as the caller writes it."""
    kind, which, *rest = where
    name = parameters[which.idx] if kind.idx == 0 else which.key
    return f"{name}{pytree.keystr(tuple(rest))}"


def dtype_of(tensor: Tensor, title: str) -> Dtype:
    """The element type; BuildError where no engine has it."""
    try:
        return Dtype.of(tensor.dtype)
    except ValueError:
        raise BuildError(
            f"{title} is {tensor.dtype}, which no engine takes; the types are {[str(dtype) for dtype in Dtype]}"
        ) from None


def alignment(engine: EngineKind) -> int:
    """Bytes that the address of a state must be a multiple of."""
    return ALIGNMENT["cpu" if engine == "torch" else "cuda"]


def export_for(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    engine: EngineKind,
    *,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Export a module for an engine of this kind; what lies on a GPU is moved to the CPU for the builder, where the engine runs on one.

    Raises:
        BuildError: it cannot be exported, has no example inputs, or lies on a GPU while the engine runs on the CPU.
    """
    exported = export_module(module, example_inputs, dynamic_shapes, kwargs)
    if exported.example_inputs is None:
        raise BuildError(
            "the exported program has no example inputs, which the engine is verified with; export it anew"
        )
    leaves = torch.utils._pytree.tree_leaves(exported.example_inputs)
    tensors = {
        **exported.state_dict,
        **{f"example input {place}": leaf for place, leaf in enumerate(leaves)},
    }
    away = {
        name: x
        for name, x in tensors.items()
        if isinstance(x, torch.Tensor) and x.device.type != "cpu"
    }
    if away and engine == "torch":
        name, tensor = next(iter(away.items()))
        raise BuildError(
            f"{name} lies on {tensor.device}; a PyTorch engine runs on the CPU: move module and inputs with .cpu(), or take TensorRT"
        )
    return move_to_device_pass(exported, "cpu") if away else exported
