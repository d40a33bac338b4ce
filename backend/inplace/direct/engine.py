"""An engine without a server: called like the module it was built from, with its states updated where they lie."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

import inplace.operators  # noqa: F401  registers the operators that the graph calls
from inplace.direct.checks import Checks
from inplace.direct.files import check_target, write_held
from inplace.direct.manifest import FILE_NAME, DirectManifest, DirectState
from inplace.engines.prepack import prepack_linears
from inplace.errors import CallError, LoadError
from inplace.files import published
from inplace.operators import written_states

SLOTS = "slots"
"""The graph's input between the module's own and the states."""


class Engine:
    """A loaded engine; `inplace.load` makes one.

    Calling it takes what the module took, positional or by name, and returns what it returned. States that the caller owns are updated in
    the tensors that are passed: the graph is handed their addresses, anew in each call, so different caches may alternate. States that
    the module owned, its buffers, are held by the engine. An output whose value is a state's is a tensor of its own.

    Not thread-safe where the engine holds states.

    Attributes:
        manifest: what the engine is.
        states: the states that it holds, by the buffer's name; they may be written (``.zero_()``), never replaced.
    """

    def __init__(self, folder: Path, manifest: DirectManifest, graph: GraphModule, checks: Checks, held: Mapping[str, Tensor]) -> None:
        self.manifest = manifest
        self.states: Mapping[str, Tensor] = MappingProxyType(dict(held))
        self._folder = folder
        self._graph = graph
        self._checks = checks
        self._slots = torch.arange(manifest.rows, dtype=torch.int32, device=manifest.engine.device)
        self._inputs = _tree(manifest.call.inputs, folder)
        self._outputs = _tree(manifest.call.outputs, folder)
        if self._inputs.num_leaves != len(manifest.call.arguments):
            raise LoadError(f"{folder / FILE_NAME}: the tree of arguments does not fit the arguments; build the engine again")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """See `inplace.load`."""
        manifest = DirectManifest.load(folder)
        if (manifest.engine.kind, manifest.engine.device) != ("torch", "cpu"):
            raise LoadError(f"{folder} holds a {manifest.engine.kind} engine for {manifest.engine.device}; only torch on cpu can be called")
        path = manifest.engine.checked(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reader warns that its read-only buffers become tensors; nothing writes weights
                exported = torch.export.load(path)
        except Exception as error:  # torch.export raises whatever the archive reader raises
            raise LoadError(f"{path} cannot be read as a torch.export program ({error}); build the engine again") from error
        _check_graph(path, exported, manifest)
        checks = Checks(exported, manifest, str(path))
        module = exported.module(check_guards=False)
        assert isinstance(module, GraphModule)
        engine = cls(folder, manifest, _plain(module), checks, _held(folder, manifest))
        if len(exported.graph_signature.user_outputs) != engine._outputs.num_leaves:
            raise LoadError(
                f"{path} returns {len(exported.graph_signature.user_outputs)} outputs, the manifest says otherwise; build again"
            )
        return engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step.

        Raises:
            CallError: an argument is not what the engine was built for; nothing was written.
            IndexError: a position, whose value only the graph knows, is outside its state. States written before it stay written.
        """
        leaves = self._leaves(args, kwargs)
        arguments = self.manifest.call.arguments
        self._checks.check(arguments, leaves, self.states)
        given = {argument.name: leaf for argument, leaf in zip(arguments, leaves, strict=True)}
        inputs = [given[argument.name] for argument in self.manifest.graph_inputs]
        bound = [
            _bound(state, given[state.name] if state.owner == "caller" else self.states[state.source]) for state in self.manifest.states
        ]
        with torch.no_grad():
            outputs = self._graph(*inputs, self._slots, *bound)
        return pytree.tree_unflatten(outputs, self._outputs)

    def save(self, path: Path | str) -> None:
        """Write the engine, with the values its states have now, to another directory or its own.

        Raises:
            LoadError: the directory that it was loaded from is gone or changed, or ``path`` holds something else than such an engine.
            OSError: it cannot be written; what stood there stands.
        """
        target = Path(path)
        check_target(target)
        source = self.manifest.engine.checked(self._folder)
        with published(target) as folder:
            shutil.copyfile(source, folder / source.name)
            self.manifest.model_copy(update={"held": write_held(folder, self.states)}).save(folder)

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of the manifest, whichever way each argument was passed."""
        call = self.manifest.call
        if len(args) > len(call.parameters):
            raise CallError(f"{len(args)} arguments were passed, the engine takes {len(call.parameters)}: {', '.join(call.parameters)}")
        named = dict(zip(call.parameters, args, strict=False))
        if twice := sorted(named.keys() & kwargs.keys()):
            raise CallError(f"argument {twice[0]} was passed twice, by position and by name")
        named.update(kwargs)
        if missing := [name for name in call.parameters if name not in named]:
            raise CallError(f"argument {missing[0]} is missing; the engine was built with {', '.join(call.parameters)}")
        if unknown := [name for name in named if name not in call.parameters]:
            raise CallError(f"argument {unknown[0]} is not known; the engine was built with {', '.join(call.parameters)}")
        split = call.positional
        tree = (tuple(named[name] for name in call.parameters[:split]), {name: named[name] for name in call.parameters[split:]})
        try:
            return list(self._inputs.flatten_up_to(tree))
        except ValueError as error:
            raise CallError(f"the arguments are nested in another way than at the build: {error}; pass {self._names()}") from error

    def _names(self) -> str:
        return ", ".join(argument.where for argument in self.manifest.call.arguments)


def _bound(state: DirectState, tensor: Tensor) -> Tensor:
    """The same memory with the slot axis in front."""
    return tensor if state.leading else tensor.unsqueeze(0)


def _check_graph(path: Path, exported: torch.export.ExportedProgram, manifest: DirectManifest) -> None:
    """The graph is the truth: what it takes, and the states it writes, must be the manifest's."""
    found = list(exported.graph_signature.user_inputs)
    wanted = [argument.name for argument in manifest.graph_inputs] + [SLOTS] + [state.name for state in manifest.states]
    if found != wanted:
        raise LoadError(f"{path} takes {found}, the manifest says {wanted}; build the engine again")
    written, declared = set(written_states(exported.graph)), {alias.input for alias in manifest.parsed_aliases}
    if written != declared:
        raise LoadError(
            f"{path}: the states the graph writes in place and the aliases of the manifest differ in {sorted(written ^ declared)}; "
            f"build the engine again"
        )
    if wrong := [str(alias) for alias in manifest.parsed_aliases if alias.kind != "operator"]:
        raise LoadError(f"{path} is a graph of PyTorch, whose states are updated by operators; the manifest says {wrong}; build again")


def _plain(module: GraphModule) -> GraphModule:
    """The module taking and returning flat tuples, its weights packed."""
    module.graph.set_codegen(CodeGen())  # the engine flattens and checks its arguments itself
    last = module.graph.output_node()
    last.args = (tuple(pytree.tree_leaves(last.args[0])),)
    prepack_linears(module)
    return GraphModule(module, module.graph)


def _tree(text: str, folder: Path) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except Exception as error:  # of many types: a class that is not registered here, or a text that is no tree
        raise LoadError(
            f"{folder / FILE_NAME}: the arguments or outputs have a type that cannot be made here ({error}); import the module that "
            f"registers it (torch.export.register_dataclass) before loading"
        ) from error


def _held(folder: Path, manifest: DirectManifest) -> dict[str, Tensor]:
    """The states that the module owned, with the values that were saved."""
    if manifest.held is None:
        return {}
    path = manifest.held.checked(folder)
    found = torch.load(path, weights_only=True, map_location=manifest.engine.device)
    wanted = {state.source: (state.shape, state.dtype.as_torch) for state in manifest.states if state.owner == "module"}
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} != wanted:
        raise LoadError(f"{path} does not hold the states {wanted} of the manifest; build the engine again")
    return {name: tensor.contiguous() for name, tensor in found.items()}
