"""Build an engine from a user's own module, to be called without a server.

``inplace_builder.build`` is the module of server builds, so the function is ``inplace_builder.api.build``.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from inplace.artifacts import EngineFile, File
from inplace.direct import Engine
from inplace.direct.files import check_target, write_held
from inplace.direct.manifest import Argument, Call, DirectManifest, DirectState
from inplace.dtypes import Dtype
from inplace.errors import LoadError
from inplace.files import published
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from inplace_builder import archive
from inplace_builder.build import built_with
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.capture.functional import exported_program
from inplace_builder.engine_files import TORCH_FILE
from inplace_builder.errors import BuildError, brief
from inplace_builder.passes.states import Owner
from inplace_builder.verify import TOLERANCE, same_bits

CALLS = 4
"""Calls that an engine is verified with; from the third on the floating-point inputs are the example's in another order."""


def build(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    path: Path | str,
    kwargs: Mapping[str, Any] | None = None,
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    consecutive: Collection[str] = (),
    strict: bool = False,
) -> Engine:
    """Build a module that mutates its inputs or buffers into an engine that is called like it, and write that.

    Before it is put in its place the engine is loaded from its files and called against the module, outputs and states compared after each
    of four calls. Neither the module nor the example inputs are changed. The engine's own states begin with the buffers' values.

    Args:
        module: on the CPU; or ``torch.export.export`` of it, whose example inputs are taken.
        example_inputs: positional arguments; dicts, tuples and registered dataclasses of tensors too.
        path: the folder to write; an engine there is replaced, anything else refused.
        kwargs: keyword arguments.
        states, dynamic_shapes, consecutive, strict: see `capture_exported`.

    Raises:
        BuildError: with nothing written.
    """
    target = Path(path)
    try:
        check_target(target)
    except LoadError as error:
        raise BuildError(str(error)) from error
    exported = exported_program(module, example_inputs, dynamic_shapes, kwargs)
    if exported.example_inputs is None:
        raise BuildError("the exported program has no example inputs, which the engine is verified with; export it anew")
    arguments = deepcopy(exported.example_inputs)  # (args, kwargs)
    reference = _reference(module)
    capture = capture_exported(exported, states=states, consecutive=consecutive, strict=strict)
    _check_device(capture)
    call = _call(exported, capture)
    try:
        with published(target) as folder:
            manifest = _write(folder, capture, call)
            notes = _verify(_loaded(folder), reference, arguments)
            manifest.model_copy(update={"built_with": manifest.built_with | notes}).save(folder)
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}; free space there or choose another place") from error
    return Engine.load(target)


def _reference(module: torch.nn.Module | ExportedProgram) -> torch.nn.Module:
    """A copy to compare with, whose buffers change as the engine's states do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own, where an exported program is copied
            copied = deepcopy(module)
    except Exception as error:
        raise BuildError(f"the module cannot be copied, which verification needs: {brief(error)}") from error
    return copied.module() if isinstance(copied, ExportedProgram) else copied


def _check_device(capture: ExportedCapture) -> None:
    tensors = {**capture.exported.state_dict, **{state.found.source: state.found.initial for state in capture.states}}
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise BuildError(
                f"{name} lies on {tensor.device}; engines that are called directly run on the CPU: move the module with .cpu()"
            )


def _call(exported: ExportedProgram, capture: ExportedCapture) -> Call:
    """How the module was called, leaf by leaf."""
    args, named = exported.example_inputs
    signature = exported.module_call_graph[0].signature
    assert signature is not None and signature.in_spec is not None
    given = list(signature.forward_arg_names or ())
    parameters = tuple(given) if len(given) == len(args) + len(named) else (*(f"argument_{i}" for i in range(len(args))), *named)
    leaves = pytree.tree_flatten_with_path((args, named))[0]
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if len(leaves) != len(specs):
        raise BuildError(f"torch.export took {len(specs)} of {len(leaves)} arguments; pass each tensor of a call as an argument of its own")
    states = {state.name for state in capture.states}
    placeholders = {node.name: node for node in capture.exported.graph.nodes if node.op == "placeholder"}
    arguments: list[Argument] = []
    for (where, leaf), spec in zip(leaves, specs, strict=True):
        title = _title(where, parameters)
        if isinstance(spec.arg, ConstantArgument):
            if not isinstance(leaf, bool | int | float | str | None):
                raise BuildError(f"argument {title} is a {type(leaf).__name__}; an engine takes tensors, numbers and constants")
            arguments.append(Argument(where=title, kind="constant", value=leaf))
            continue
        value = placeholders[spec.arg.name].meta["val"]
        if isinstance(leaf, Tensor):
            kind: Literal["state", "tensor"] = "state" if spec.arg.name in states else "tensor"
            shape = leaf.shape if kind == "state" else value.shape
            extents = tuple(extent if isinstance(extent, int) else str(extent.node.expr) for extent in shape)
            arguments.append(Argument(where=title, name=spec.arg.name, kind=kind, dtype=_dtype(leaf, title), shape=extents))
        elif isinstance(value, torch.SymInt):
            arguments.append(Argument(where=title, name=spec.arg.name, kind="number", shape=(str(value.node.expr),)))
        else:
            raise BuildError(f"argument {title} is a {type(leaf).__name__} that changes from call to call; pass a tensor")
    try:
        trees = [pytree.treespec_dumps(tree) for tree in (signature.in_spec, signature.out_spec)]
    except Exception as error:
        raise BuildError(
            f"the arguments or outputs have a type that cannot be written ({brief(error)}): register it with a serialized_type_name "
            f"(torch.export.register_dataclass), or pass and return dicts and tuples"
        ) from error
    return Call(arguments=tuple(arguments), inputs=trees[0], outputs=trees[1], parameters=parameters, positional=len(args))


def _title(where: tuple[Any, ...], parameters: Sequence[str]) -> str:
    """The path of a leaf in ``(args, kwargs)`` as the caller writes it."""
    kind, which, *rest = where
    name = parameters[which.idx] if kind.idx == 0 else which.key
    return f"{name}{pytree.keystr(tuple(rest))}"


def _dtype(tensor: Tensor, title: str) -> Dtype:
    try:
        return Dtype.of(tensor.dtype)
    except ValueError:
        raise BuildError(f"{title} is {tensor.dtype}, which no engine takes; the types are {[str(dtype) for dtype in Dtype]}") from None


def _write(folder: Path, capture: ExportedCapture, call: Call) -> DirectManifest:
    archive.save(capture.exported, folder / TORCH_FILE)
    weights = next((tensor for tensor in capture.exported.state_dict.values() if tensor.is_floating_point()), None)
    dtype = _dtype(weights, "a weight") if weights is not None else Dtype.FLOAT32
    where = {argument.name: argument.where for argument in call.arguments}
    manifest = DirectManifest(
        states=tuple(
            DirectState(
                name=state.name,
                owner="caller" if state.found.owner is Owner.CALLER else "module",
                source=where.get(state.name, state.found.source),
                dtype=_dtype(state.found.initial, state.found.source),
                shape=tuple(state.found.initial.shape),
                leading=state.leading,
            )
            for state in capture.states
        ),
        aliases=tuple(str(alias) for alias in capture.aliases),
        lowering=capture.lowering,
        call=call,
        rows=capture.rows,
        engine=EngineFile(kind="torch", **File.of(folder / TORCH_FILE).model_dump(), device="cpu", dtype=dtype),
        held=write_held(folder, {s.found.source: s.found.initial for s in capture.states if s.found.owner is Owner.MODULE}),
        built_with=built_with(),
    )
    manifest.save(folder)
    return manifest


def _loaded(folder: Path) -> Engine:
    try:
        return Engine.load(folder)
    except LoadError as error:
        raise BuildError(f"the engine cannot be loaded as it was written: {error}") from error


def _verify(engine: Engine, reference: torch.nn.Module, arguments: Any) -> dict[str, str]:
    """Call engine and module side by side, each on its own copy of the states."""
    theirs, mine = deepcopy(arguments), deepcopy(arguments)
    kinds = [argument.kind for argument in engine.manifest.call.arguments]
    buffers = dict(reference.named_buffers(remove_duplicate=False))
    worst, exact = 0.0, True

    def same(title: str, found: object, expected: object) -> None:
        nonlocal worst, exact
        if isinstance(found, Tensor) and isinstance(expected, Tensor):
            error = _difference(title, found, expected)
            worst, exact = max(worst, error), exact and error == 0
        elif type(found) is not type(expected) or found != expected:
            raise BuildError(f"{title} is {found!r}, the module's is {expected!r}; the engine is not written")

    for index in range(CALLS):
        if index == 2:
            theirs, mine = (_reordered(tree, kinds) for tree in (theirs, mine))
        before = pytree.tree_leaves(deepcopy(mine))
        try:
            with torch.no_grad():
                expected = pytree.tree_leaves(reference(*theirs[0], **theirs[1]))
        except Exception as error:
            raise BuildError(f"the module cannot be called {index + 1} times with its example inputs: {brief(error)}") from error
        addresses = {source: tensor.data_ptr() for source, tensor in engine.states.items()}
        try:
            found = pytree.tree_leaves(engine(*mine[0], **mine[1]))
        except Exception as error:  # the module took the same arguments
            raise BuildError(f"the engine fails where the module does not ({brief(error)}); it is not written") from error
        if len(found) != len(expected):
            raise BuildError(f"the engine returns {len(found)} outputs, the module {len(expected)}; it is not written")
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(f"output {place} of call {index}", one, other)
        for kind, argument, one, other, old in zip(
            kinds, engine.manifest.call.arguments, pytree.tree_leaves(mine), pytree.tree_leaves(theirs), before, strict=True
        ):
            if kind == "state":
                same(f"state {argument.where} after call {index}", one, other)
            elif isinstance(one, Tensor) and not same_bits(one.reshape(-1), old.reshape(-1)):
                raise BuildError(f"the engine changed its input {argument.where}; it is not written")
        for source, tensor in engine.states.items():
            same(f"state {source} after call {index}", tensor, buffers[source])
        if addresses != {source: tensor.data_ptr() for source, tensor in engine.states.items()}:
            raise BuildError("the engine moved one of its states; it is not written")
    return {"verified_calls": str(CALLS), "verified_error": "0, bit for bit" if exact else f"{worst:.1e}"}


def _reordered(tree: Any, kinds: Sequence[str]) -> Any:
    """Other values that surely are as valid: the floating-point inputs back to front. Integers may be positions, so they stay."""
    leaves, spec = pytree.tree_flatten(tree)
    flip: Callable[[Tensor], Tensor] = lambda tensor: tensor.flip(tuple(range(tensor.dim())))  # noqa: E731
    return pytree.tree_unflatten(
        [
            flip(x) if kind == "tensor" and isinstance(x, Tensor) and x.is_floating_point() else x
            for x, kind in zip(leaves, kinds, strict=True)
        ],
        spec,
    )


def _difference(title: str, found: Tensor, expected: Tensor) -> float:
    """0 if equal bit for bit, else the relative error; BuildError if that is too large."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise BuildError(
            f"{title} is {list(found.shape)} {found.dtype}, the module's {list(expected.shape)} {expected.dtype}; it is not written"
        )
    if same_bits(found.reshape(-1), expected.reshape(-1)):
        return 0.0
    equal = (found == expected) | ((found != found) & (expected != expected))  # noqa: PLR0124  NaN in the same places
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    one, other = (tensor.to(wide).masked_fill(equal & ~tensor.isfinite(), 0) for tensor in (found, expected))
    error = float((one - other).norm() / other.norm().clamp(min=1e-12))
    tolerance = TOLERANCE.get(Dtype.of(found.dtype), 0.0)
    if not error <= tolerance:
        raise BuildError(f"{title} differs from the module by {error:.1e}, more than {tolerance:.0e}; the engine is not written")
    return error
