"""A standalone engine: called like the module it was built from, states updated in place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace.errors import CallError, LoadError
from inplace.schema.files import EngineFolder, publish, record_files, replace_conflict
from inplace.schema.specs import evaluate_extent
from inplace.schema.standalone import (
    FILE_NAME,
    Argument,
    Result,
    StandaloneManifest,
    StandaloneState,
    holds_objects,
    load_tree,
    same_constant,
    with_attributes,
)
from inplace.schema.tensor_file import as_dtype, read_tensors, write_tensors
from inplace.standalone.execute import Runner, add_loaded, check_memory, open_runner

STATES_FILE = "states.safetensors"
"""The values of the states that an engine owns, by buffer name."""


def write_owned_states(folder: Path, states: Mapping[str, Tensor]) -> str | None:
    """Write the values of the states that an engine owns, by buffer name.

    Returns:
        The name of the file; None if there are no states.

    Raises:
        OSError: it cannot be written.
    """
    if not states:
        return None
    write_tensors(folder / STATES_FILE, states)
    return STATES_FILE


def check_replaceable(target: Path) -> None:
    """Raise a LoadError if ``target`` is something else than an engine to replace."""
    if (reason := replace_conflict(target, Path(FILE_NAME))) is not None:
        raise LoadError(reason)


def load_owned_states(folder: EngineFolder, manifest: StandaloneManifest) -> dict[str, Tensor]:
    """Load the states that an engine owns, by buffer name.

    Raises:
        LoadError: the file is missing or changed, or its tensors are not the manifest's.
    """
    if manifest.owned is None:
        return {}
    path = folder.path / manifest.owned
    tensors = read_tensors(folder.read(manifest.file(manifest.owned)), str(path))
    expected = {
        state.source: (state.shape, state.dtype.as_torch)
        for state in manifest.states
        if state.owner == "module"
    }
    for state in manifest.states:
        if state.source in tensors:
            tensors[state.source] = as_dtype(tensors[state.source], state.dtype)
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} != expected:
        raise LoadError(
            f"{path} does not hold the states {expected} of the manifest; build the engine again"
        )
    device = manifest.engine.device
    # Copies, so that each state has memory of its own, aligned for the kernels.
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


class Engine(nn.Module):
    """A loaded engine; `inplace.load` makes one.

    It is called with the arguments of its module, positional or by name, and returns what the
    module returned. A call updates the caller's states in the tensors that were passed. The engine
    binds their addresses in each call, so a caller may alternate between several caches. The
    engine owns the states that were buffers of the module. An output never shares memory with a
    state.

    The engine is a module whose buffers are the states it owns, so `torch.export.export` takes it.
    The program has one call of ``inplace::execute``, which holds the engine file.
    `torch.export.save` and `torch.export.load` work as for any program, after
    ``import inplace.standalone`` in the process that loads.

    An engine that owns states is not thread-safe.

    Attributes:
        manifest: describes the engine.
        owned: a module with the owned states as buffers, under their names in the original module.
    """

    def __init__(
        self,
        folder: EngineFolder,
        manifest: StandaloneManifest,
        runner: Runner,
        owned: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.owned = nn.Module()
        for source, tensor in owned.items():
            _register(self.owned, source, tensor)
        self._folder, self._runner, self._checker = folder, runner, ArgumentChecker(manifest)
        self._inputs = _tree(manifest.call.in_spec, folder.path)
        self._takes_objects = holds_objects(self._inputs)
        self._outputs = _tree(manifest.call.out_spec, folder.path)
        if (self._inputs.num_leaves, self._outputs.num_leaves) != (
            len(manifest.call.arguments),
            len(manifest.call.results),
        ):
            raise LoadError(
                f"{folder.path / FILE_NAME}: the pytrees do not have the leaves of the arguments "
                "and results; build the engine again"
            )
        self._text = manifest.model_dump_json()
        # Mapped, not read: only an exported program needs the bytes, and `inplace::execute` checks
        # them before it loads them.
        record = manifest.file(manifest.engine.file)
        with folder.open(record) as descriptor:
            self._file = torch.from_file(
                f"/proc/self/fd/{descriptor}", shared=False, size=record.bytes, dtype=torch.uint8
            )
        add_loaded(manifest, self._text, runner)

    @property
    def states(self) -> Mapping[str, Tensor]:
        """The owned states, by buffer name.

        They may be written, for example with ``.zero_()``, but not replaced.
        """
        names = [state.source for state in self.manifest.bases if state.owner == "module"]
        return MappingProxyType({name: self.owned.get_buffer(name) for name in names})

    @classmethod
    def load(cls, path: Path, *, cuda_graphs: bool = True, trust: Path | str | None = None) -> Self:
        """Load an engine, with arguments and errors as `inplace.load`."""
        manifest = StandaloneManifest.load(path)
        folder = EngineFolder(path, None if trust is None else [trust])
        record = manifest.file(manifest.engine.file)
        read = folder.read if manifest.engine.kind == "torch" else folder.read_code
        title = str(path / record.name)
        runner = open_runner(read(record), manifest, title, cuda_graphs=cuda_graphs)
        return cls(folder, manifest, runner, load_owned_states(folder, manifest))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step.

        Raises:
            CallError: an argument is not what the engine was built for; no state was written.
            IndexError: a position is outside its state (only PyTorch engines, where the graph
                checks it). Writes before that one stay.
        """
        call = self.manifest.call
        leaves = self._leaves(args, kwargs)
        known = self._checker.check(call.arguments, leaves)
        given = {
            argument.where: leaf for argument, leaf in zip(call.arguments, leaves, strict=True)
        }
        inputs = [given[argument.where] for argument in self.manifest.graph_inputs]
        bases = [
            given[state.source] if state.owner == "caller" else self._owned_state(state)
            for state in self.manifest.bases
        ]
        if torch.compiler.is_compiling():  # torch.export too
            results = self._call_operator(inputs, bases, known)
        else:
            states = self.manifest.views(bases)
            tensors = {
                f"argument {argument.where}": given[argument.where]
                for argument in call.arguments
                if argument.kind == "tensor"
            }
            check_memory(list(zip(self.manifest.states, states, strict=True)), tensors)
            results = self._runner.run(inputs, states)
        return pytree.tree_unflatten(results, self._outputs)

    def _owned_state(self, state: StandaloneState) -> Tensor:
        tensor = self.owned.get_buffer(state.source)
        if not state.matches(tensor):
            raise CallError(
                f"the engine's state {state.source} has become {list(tensor.shape)} "
                f"{tensor.dtype}, the engine was built for {list(state.shape)} {state.dtype}: an "
                "engine cannot be converted (half(), to()); build it from the converted module"
            )
        return tensor

    def _call_operator(
        self, inputs: list[Any], bases: list[Tensor], known: Mapping[str, Any]
    ) -> list[Any]:
        """Run a step as ``inplace::execute``, the one operator of an exported program."""
        results: list[Any] = []
        for result in self.manifest.call.results:
            if result.kind == "constant":
                results.append(result.value)
            else:
                results.append(self._allocate(result, known))
        numbers = [value for value in inputs if not isinstance(value, Tensor)]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        written = [value for value in results if isinstance(value, Tensor)]
        torch.ops.inplace.execute(self._file, self._text, numbers, tensors, bases, written)
        return results

    def _allocate(self, result: Result, known: Mapping[str, Any]) -> Any:
        """A new tensor for a result; or the value of a result that is a number."""
        try:
            extents = [evaluate_extent(extent, known) for extent in result.shape]
        except ValueError as error:
            raise CallError(
                f"a result of the shape {list(result.shape)} cannot be exported ({error}): "
                "the shape depends on values, which only the engine knows; call the engine itself"
            ) from error
        if result.dtype is None:
            return extents[0]
        return torch.empty(extents, dtype=result.dtype.as_torch, device=self.manifest.engine.device)

    def save(self, path: Path | str) -> None:
        """Write the engine and the current values of its states.

        Args:
            path: another folder, or the one that the engine was loaded from.

        Raises:
            LoadError: the folder that the engine was loaded from is gone or changed, or ``path``
                is something else than a standalone engine.
            OSError: ``path`` cannot be written and is unchanged.
        """
        target = Path(path)
        check_replaceable(target)
        record = self.manifest.file(self.manifest.engine.file)
        content = self._folder.read(record)
        with publish(target) as folder:
            (folder / record.name).write_bytes(content)
            owned = write_owned_states(folder, self.states)
            files = record_files(folder, leave_out=FILE_NAME)
            self.manifest.model_copy(update={"owned": owned, "files": files}).save(folder)

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call in the manifest's order, however the arguments were passed."""
        call = self.manifest.call
        names = ", ".join(call.parameters)
        if len(args) > len(call.parameters):
            raise CallError(
                f"{len(args)} arguments were passed, "
                f"the engine takes {len(call.parameters)}: {names}"
            )
        named = dict(zip(call.parameters, args, strict=False))
        if twice := sorted(named.keys() & kwargs.keys()):
            raise CallError(f"argument {twice[0]} was passed twice, by position and by name")
        named.update(kwargs)
        if missing := [name for name in call.parameters if name not in named]:
            raise CallError(f"argument {missing[0]} is missing; the engine was built with {names}")
        if unknown := [name for name in named if name not in call.parameters]:
            raise CallError(f"argument {unknown[0]} is unknown; the engine was built with {names}")
        split = call.positional
        tree = (
            tuple(named[name] for name in call.parameters[:split]),
            {name: named[name] for name in call.parameters[split:]},
        )
        try:
            if self._takes_objects:
                tree = with_attributes(self._inputs, tree)
            return list(self._inputs.flatten_up_to(tree))
        except ValueError as error:
            raise CallError(
                f"the arguments are nested in another way than at the build: {error}; "
                f"pass {', '.join(argument.where for argument in call.arguments)}"
            ) from error


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer under a qualified name, with the modules on the way."""
    *parents, name = name.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.register_buffer(name, tensor)


def _tree(text: str, folder: Path) -> pytree.TreeSpec:
    try:
        return load_tree(text)
    except ValueError as error:
        raise LoadError(
            f"{folder / FILE_NAME}: the arguments or outputs have a type that cannot be made here "
            f"({error}); import the module that registers it (torch.export.register_dataclass) "
            "before loading"
        ) from error


class ArgumentChecker:
    """Checks the arguments of an engine against its manifest."""

    def __init__(self, manifest: StandaloneManifest) -> None:
        self._device = manifest.engine.device
        self._ranges = manifest.call.ranges
        self._write_notes = {
            state.source: state.write_note for state in manifest.bases if state.owner == "caller"
        }

    def check(self, arguments: Sequence[Argument], given: Sequence[object]) -> dict[str, Any]:
        """Check the leaves of a call, apart from their memory (`check_memory`).

        Args:
            arguments: what the engine takes.
            given: the leaves, in the order of ``arguments``.

        Returns:
            The value of each symbol in the shapes.

        Raises:
            CallError: names the argument, what was expected and what to do.
        """
        bound: dict[str, tuple[Any, str]] = {}
        for argument, value in zip(arguments, given, strict=True):
            if argument.kind == "constant":
                _check_constant(argument, value)
            elif argument.kind == "number":
                if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
                    raise CallError(
                        f"argument {argument.where} is {_kind(value)}, the engine takes an int"
                    )
                self._bind(argument, "value", value, argument.shape[0], bound)
            else:
                try:
                    self._check_tensor(argument, value, bound)
                except CallError as error:
                    note = self._write_notes.get(argument.where, "")
                    raise CallError(f"{error}{note}") from None
        known = {symbol: value for symbol, (value, _) in bound.items()}
        _check_computed(arguments, given, known)
        return known

    def _check_tensor(
        self, argument: Argument, value: object, bound: dict[str, tuple[Any, str]]
    ) -> None:
        assert argument.dtype is not None
        if not isinstance(value, Tensor):
            raise CallError(
                f"argument {argument.where} is {_kind(value)}, "
                f"the engine takes a tensor of {_shape(argument.shape)}"
            )
        state = argument.kind == "state"
        advice = (
            "allocate the state like that: it is updated in its own memory"
            if state
            else "convert it before the call"
        )
        if value.dtype != argument.dtype.as_torch:
            raise CallError(
                f"argument {argument.where} is {value.dtype}, "
                f"the engine was built for {argument.dtype.as_torch}; {advice}"
            )
        if value.device.type != self._device:
            raise CallError(
                f"argument {argument.where} is on {value.device}, "
                f"the engine runs on {self._device}; {advice}"
            )
        if value.layout is not torch.strided:
            raise CallError(
                f"argument {argument.where} has the layout {value.layout}, "
                f"the engine takes strided tensors; {advice}"
            )
        if len(argument.shape) != value.dim():
            raise CallError(
                f"argument {argument.where} is {list(value.shape)}, "
                f"the engine takes {_shape(argument.shape)}; {advice}"
            )
        for axis, (extent, expected) in enumerate(zip(value.shape, argument.shape, strict=True)):
            self._bind(argument, f"extent on axis {axis}", extent, expected, bound)
        if state and not value.is_contiguous():
            raise CallError(
                f"argument {argument.where} is a state with strides {value.stride()}, "
                "which must be contiguous: call .contiguous() once, "
                "and pass that tensor in every call"
            )

    def _bind(
        self,
        argument: Argument,
        what: str,
        actual: Any,
        expected: int | str,
        bound: dict[str, tuple[Any, str]],
    ) -> None:
        """Compare a number with the graph's, or bind the graph's symbol to it."""
        title = f"argument {argument.where} has the {what} {actual}"
        if isinstance(expected, int):
            if actual != expected:
                raise CallError(
                    f"{title}, the engine was built for {expected}; "
                    "build it with dynamic_shapes to take others"
                )
            return
        low, high = self._ranges.get(expected, (None, None))
        if (low is not None and actual < low) or (high is not None and actual > high):
            raise CallError(
                f"{title}, the engine was built for {low} to "
                f"{high if high is not None else 'any'}; widen dynamic_shapes"
            )
        if expected.isidentifier():
            other, source = bound.setdefault(expected, (actual, argument.where))
            if other != actual:
                raise CallError(f"{title}, which must be that of {source}, {other}")


def _check_computed(
    arguments: Sequence[Argument], given: Sequence[object], known: Mapping[str, Any]
) -> None:
    """Check the extents that are expressions, as far as their symbols are known."""
    for argument, value in zip(arguments, given, strict=True):
        extents = value.shape if isinstance(value, Tensor) else (value,)
        for axis, (extent, expected) in enumerate(zip(extents, argument.shape, strict=False)):
            if isinstance(expected, int) or expected.isidentifier():
                continue
            try:
                computed = evaluate_extent(expected, known)
            except ValueError:
                continue
            if computed != extent:
                raise CallError(
                    f"argument {argument.where} has {extent} on axis {axis}, "
                    f"which must be {expected} = {computed}"
                )


def _check_constant(argument: Argument, value: object) -> None:
    if not same_constant(value, argument.value):
        actual = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CallError(
            f"argument {argument.where} is {actual}, the engine was built for {argument.value!r}, "
            "a constant of its graph: build another engine"
        )


def _kind(value: object) -> str:
    return (
        f"a tensor of {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
