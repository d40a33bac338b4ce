"""Build an engine from a module, to be called without a server.

Export, describe the call, write the files, verify, publish.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from inplace.engines.gpus import full_float32
from inplace.schema.files import record_files
from inplace.schema.specs import AliasKind, Dtype, Lowering
from inplace.schema.standalone import (
    ALIGNMENT,
    FILE_NAME,
    Argument,
    CallSignature,
    Result,
    StandaloneManifest,
    StandaloneState,
)
from inplace.standalone import Engine
from inplace.standalone.engine import write_owned_states
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.choices import EngineKind
from inplace_builder.engine_files import (
    built_with,
    check_target,
    disk_errors,
    load_errors,
    publish_engine,
    write_plan,
    write_program,
)
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import export_module
from inplace_builder.graph.program import move_to_device
from inplace_builder.graph.writer import dtype_and_shape, symbol_ranges
from inplace_builder.standalone.verify import verify
from inplace_builder.states.adapt import States, adapted_states
from inplace_builder.states.rewrite import CapturedState

if TYPE_CHECKING:
    from inplace_builder.lower.compile import CompiledPlan


def build(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    path: Path | str,
    kwargs: Mapping[str, Any] | None = None,
    engine: EngineKind = "torch",
    states: States = "auto",
    dynamic_shapes: Any = None,
    assume_consecutive: Collection[str] = (),
    alias: AliasKind | None = None,
    strict: bool = False,
    optimization_level: int | None = None,
) -> Engine:
    """Build an engine that is called like the module, and write it to ``path``.

    What the module mutates, its inputs or buffers, becomes the engine's states. Before the engine
    is published it is loaded from its files and called beside the module; outputs and states are
    compared after each call. Neither the module nor the example inputs are changed. The engine's
    own states begin with the buffers' values.

    Args:
        module: the module; or ``torch.export.export`` of it, whose example inputs are taken. On the
            CPU or, for a TensorRT engine, on a GPU.
        example_inputs: positional arguments; dicts, tuples and objects of tensors too. Of an
            object the attributes that are tensors, numbers and texts are taken, or hold such; an
            engine takes any object that has these.
        path: the folder to write; an engine there is replaced, anything else refused.
        kwargs: keyword arguments.
        engine: ``torch``, which runs on the CPU; ``tensorrt``, built for the GPU of this machine
            and run there; ``tensorrt_rtx``, the same with TensorRT for RTX.
        states: as in `capture_exported`.
        dynamic_shapes: as in `capture_exported`.
        assume_consecutive: as in `capture_exported`.
        alias: the only mechanism allowed to update states (TensorRT); None takes the first that
            can.
        strict: refuse what copies a state: a write that no pattern covers, and the mechanism
            ``copy``.
        optimization_level: how long TensorRT searches for fast kernels, from 0 to 5; None is its
            own default, 3.

    Raises:
        BuildError: with nothing written.
        LoadError: the TensorRT that was asked for is not installed.
    """
    target = Path(path)
    check_target(target, Path(FILE_NAME))
    if engine == "torch" and alias is not None:
        raise BuildError(
            "alias belongs to TensorRT engines; the PyTorch engine has no choice of mechanism"
        )
    with adapted_states(module, example_inputs, kwargs, states) as adapted:
        exported = export_for(
            module,
            adapted.args,
            engine,
            dynamic_shapes=adapted.shapes(dynamic_shapes),
            kwargs=adapted.kwargs,
        )
        capture = capture_exported(
            exported,
            states=adapted.states,
            assume_consecutive=assume_consecutive,
            strict=strict,
            alignment=alignment(engine),
        )
        call = describe_call(exported, capture)
        # on the device where the module takes them
        arguments: Any = (adapted.args, dict(adapted.kwargs))
        if isinstance(module, torch.nn.Module):
            reference = module
        else:
            reference, arguments = module.module(), module.example_inputs
        with publish_engine(target) as folder:
            plan = None
            if engine != "torch":  # importing the converters takes as long as importing PyTorch
                from inplace_builder.lower.compile import Target
                from inplace_builder.standalone.plan import build_plan

                plan = build_plan(
                    capture,
                    call,
                    Target.of(engine),
                    alias=alias,
                    strict=strict,
                    optimization_level=optimization_level,
                )
            with disk_errors(target):
                manifest = write_files(folder, capture, call, plan)
            with load_errors():
                loaded = Engine.load(folder)
            with full_float32() if torch.cuda.is_available() else nullcontext():
                notes = verify(loaded, reference, arguments, assume_consecutive=assume_consecutive)
            manifest = manifest.model_copy(update={"built_with": manifest.built_with | notes})
            with disk_errors(target):
                manifest.save(folder)
    return Engine.load(target)


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
    """Export a module for an engine of this kind, on the CPU.

    A module on a GPU is moved to the CPU for the builder, if the engine runs on a GPU.

    Raises:
        BuildError: it cannot be exported, has no example inputs, or is on a GPU while the engine
            runs on the CPU.
    """
    exported = export_module(module, example_inputs, dynamic_shapes, kwargs)
    if exported.example_inputs is None:
        raise BuildError(
            "the exported program has no example inputs, which the engine is verified with; "
            "export it anew"
        )
    leaves = pytree.tree_leaves(exported.example_inputs)
    values = {
        **exported.state_dict,
        **{f"example input {place}": leaf for place, leaf in enumerate(leaves)},
    }
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            continue
        if engine == "torch":
            raise BuildError(
                f"{name} is on {value.device}; a PyTorch engine runs on the CPU: "
                f"move module and inputs with .cpu(), or build for TensorRT"
            )
        return move_to_device(exported, "cpu")
    return exported


def describe_call(exported: ExportedProgram, capture: ExportedCapture) -> CallSignature:
    """Describe how the module was called, leaf by leaf.

    Raises:
        BuildError: an argument or a result has a type that an engine cannot take or return.
    """
    args, kwargs = exported.example_inputs
    signature = exported.module_call_graph[0].signature
    assert signature is not None and signature.in_spec is not None
    names = tuple(signature.forward_arg_names or ())
    if len(names) != len(args) + len(kwargs):
        names = (*(f"argument_{place}" for place in range(len(args))), *kwargs)
    arguments = _arguments(exported, capture, names)
    try:
        in_spec, out_spec = map(pytree.treespec_dumps, (signature.in_spec, signature.out_spec))
    except Exception as error:
        raise BuildError(
            f"the arguments or outputs have a type that cannot be written ({brief(error)}): "
            f"register it with a serialized_type_name (torch.export.register_dataclass), "
            f"or pass and return dicts and tuples"
        ) from error
    try:
        returned = result_records(capture.exported)
    except ValueError as error:
        raise BuildError(
            f"an output cannot be returned by an engine: {brief(error)}; "
            f"return tensors, numbers and constants"
        ) from error
    return CallSignature(
        arguments=arguments,
        ranges=symbol_ranges(capture.exported, [argument.shape for argument in arguments]),
        results=returned,
        in_spec=in_spec,
        out_spec=out_spec,
        parameters=names,
        positional=len(args),
    )


def result_records(exported: ExportedProgram) -> tuple[Result, ...]:
    """Describe the leaves of what a graph returns.

    Raises:
        ValueError: a result has a type that no engine returns.
    """
    records = []
    for leaf in pytree.tree_leaves(exported.graph.output_node().args[0]):
        if not isinstance(leaf, Node):
            records.append(Result(kind="constant", value=leaf))
            continue
        dtype, shape = dtype_and_shape(leaf.meta["val"])
        if dtype is None:
            records.append(Result(kind="number", shape=shape))
            continue
        try:
            records.append(Result(kind="tensor", dtype=Dtype.of(dtype), shape=shape))
        except ValueError:
            raise ValueError(
                f"output {leaf} is {dtype}, which no engine returns; convert it"
            ) from None
    return tuple(records)


def _arguments(
    exported: ExportedProgram, capture: ExportedCapture, parameters: Sequence[str]
) -> tuple[Argument, ...]:
    """The leaves of ``(args, kwargs)``."""
    leaves = pytree.tree_flatten_with_path(exported.example_inputs)[0]
    specs = [
        spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    ]
    if len(leaves) != len(specs):
        raise BuildError(
            f"torch.export took {len(specs)} of {len(leaves)} arguments; "
            f"pass each tensor of a call as an argument of its own"
        )
    states = {state.tensor.module_tensor.name: state for state in capture.states}
    placeholders = {node.name: node for node in capture.exported.graph.find_nodes(op="placeholder")}
    arguments = []
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        where = _path_text(path, parameters)
        if isinstance(spec.arg, ConstantArgument):
            arguments.append(_constant(where, leaf))
        elif (state := states.get(spec.arg.name)) is not None:
            shape = _state_extents(leaf, state, placeholders)
            arguments.append(
                Argument(
                    where=where,
                    name=spec.arg.name,
                    kind="state",
                    dtype=dtype_of(leaf, where),
                    shape=shape,
                )
            )
        else:
            arguments.append(_input(where, leaf, placeholders[spec.arg.name]))
    return tuple(arguments)


def _constant(where: str, value: object) -> Argument:
    if not isinstance(value, bool | int | float | str | None):
        raise BuildError(
            f"argument {where} is a {type(value).__name__}; "
            f"an engine takes tensors, numbers and constants"
        )
    return Argument(where=where, kind="constant", value=value)


def _input(where: str, leaf: object, placeholder: Node) -> Argument:
    """A tensor, or a Python number that changes from call to call."""
    value = placeholder.meta["val"]
    if isinstance(leaf, Tensor):
        return Argument(
            where=where,
            name=placeholder.name,
            kind="tensor",
            dtype=dtype_of(leaf, where),
            shape=dtype_and_shape(value)[1],
        )
    if isinstance(value, torch.SymInt):
        return Argument(
            where=where, name=placeholder.name, kind="number", shape=dtype_and_shape(value)[1]
        )
    raise BuildError(
        f"argument {where} is a {type(leaf).__name__} that changes from call to call; pass a tensor"
    )


def _state_extents(
    tensor: Tensor, state: CapturedState, placeholders: Mapping[str, Node]
) -> tuple[int | str, ...]:
    """The extents of a tensor that is a state, or is divided into several."""
    extents: list[int | str] = list(tensor.shape)
    if state.tensor.dynamic_axes:  # such a tensor is not divided
        with_slots = dtype_and_shape(placeholders[state.name].meta["val"])[1]
        for axis in state.tensor.dynamic_axes:
            extents[axis] = with_slots[axis + (not state.has_slot_axis)]
    return tuple(extents)


def _path_text(path: tuple[Any, ...], parameters: Sequence[str]) -> str:
    """The path of a leaf in ``(args, kwargs)`` as the caller writes it."""
    kind, which, *rest = path
    name = parameters[which.idx] if kind.idx == 0 else which.key
    return f"{name}{pytree.keystr(tuple(rest))}"


def dtype_of(tensor: Tensor, title: str) -> Dtype:
    """The element type of a tensor.

    Raises:
        BuildError: no engine has it; names ``title``.
    """
    try:
        return Dtype.of(tensor.dtype)
    except ValueError:
        raise BuildError(
            f"{title} is {tensor.dtype}, which no engine takes; "
            f"the types are {[str(dtype) for dtype in Dtype]}"
        ) from None


def write_files(
    folder: Path, capture: ExportedCapture, call: CallSignature, plan: "CompiledPlan | None"
) -> StandaloneManifest:
    """Write a captured module as a graph for PyTorch, or as the plan that it was compiled to.

    The manifest is written too.

    Raises:
        BuildError: a weight has a type that no engine has.
        OSError: a file cannot be written.
    """
    weights = capture.exported.state_dict.values()
    weight = next((tensor for tensor in weights if tensor.is_floating_point()), None)
    dtype = dtype_of(weight, "a weight") if weight is not None else Dtype.FLOAT32
    if plan is None:
        engine, notes = write_program(capture.exported, folder, "cpu", dtype), built_with()
    else:
        engine = write_plan(
            plan.content, plan.record, plan.weights, folder, dtype, scales=plan.scales
        )
        notes = built_with(plan.record)
    owned = write_owned_states(folder, _owned_states(capture))
    manifest = StandaloneManifest(
        states=state_records(capture, call),
        aliases=tuple(str(alias) for alias in (plan or capture).aliases),
        lowering=lowering_records(capture, plan),
        call=call,
        rows=capture.rows,
        engine=engine,
        owned=owned,
        files=record_files(folder, leave_out=FILE_NAME),
        built_with=notes,
    )
    manifest.save(folder)
    return manifest


def lowering_records(capture: ExportedCapture, plan: "CompiledPlan | None") -> tuple[Lowering, ...]:
    """How each state is updated, and why.

    The reason is how the module's writes were recognised, and for a plan also the mechanism's.
    """
    if plan is None:
        return capture.lowering
    recognised = {record.state: record.reason for record in capture.lowering}
    return tuple(
        record
        if record.kind == "user"
        else record.model_copy(update={"reason": f"{recognised[record.state]}; {record.reason}"})
        for record in plan.lowering
    )


def _owned_states(capture: ExportedCapture) -> dict[str, Tensor]:
    """The initial values of the tensors that hold the engine's own states."""
    owned = (
        state.tensor.module_tensor for state in capture.states if state.tensor.owner == "module"
    )
    return {tensor.source: tensor.initial for tensor in owned}


def state_records(capture: ExportedCapture, call: CallSignature) -> tuple[StandaloneState, ...]:
    """The states as the manifest records them."""
    arguments = {argument.name: argument for argument in call.arguments}
    records = []
    for state in capture.states:
        tensor = state.tensor.module_tensor
        argument = arguments.get(tensor.name)
        records.append(
            StandaloneState(
                name=state.name,
                owner=state.tensor.owner,
                source=tensor.source if argument is None else argument.where,
                dtype=dtype_of(state.tensor.initial, state.tensor.source),
                shape=tuple(tensor.initial.shape) if argument is None else argument.shape,
                selection=state.tensor.selects,
                written_at=state.tensor.first_write.strip(),
                has_slot_axis=state.has_slot_axis,
            )
        )
    return tuple(records)
