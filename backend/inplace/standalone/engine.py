"""An engine without a server: called like the module it was built from, with its states updated where they lie.

What a directly called engine has on disk beside its graph.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace.errors import CallError, LoadError
from inplace.schema.artifacts import File
from inplace.schema.extents import evaluate
from inplace.schema.publish import publish, replace_conflict
from inplace.schema.standalone import FILE_NAME, Result, StandaloneManifest
from inplace.standalone.checks import Checks, check_memory
from inplace.standalone.execute import Runner, keep, open_runner

STATES_FILE = "states.pt"


def write_owned_states(folder: Path, states: Mapping[str, Tensor]) -> File | None:
    """Write the values of the states that an engine holds; None where it holds none."""
    if not states:
        return None
    torch.save(
        {name: tensor.detach().clone() for name, tensor in states.items()}, folder / STATES_FILE
    )
    return File.of(folder / STATES_FILE)


def check_replaceable(target: Path) -> None:
    """LoadError if ``target`` holds something that is not an engine to replace."""
    if (reason := replace_conflict(target, Path(FILE_NAME))) is not None:
        raise LoadError(reason)


def load_owned_states(folder: Path, manifest: StandaloneManifest) -> dict[str, Tensor]:
    """The states that the module owned, with the values that were saved.

    Raises:
        LoadError: the file is missing, changed, or holds something else.
    """
    if manifest.owned is None:
        return {}
    path = manifest.owned.verified(folder)
    found = torch.load(path, weights_only=True, map_location=manifest.engine.device)
    wanted = {
        state.source: (state.shape, state.dtype.as_torch)
        for state in manifest.states
        if state.owner == "module"
    }
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} != wanted:
        raise LoadError(
            f"{path} does not hold the states {wanted} of the manifest; build the engine again"
        )
    return {name: tensor.contiguous() for name, tensor in found.items()}


class Engine(nn.Module):
    """A loaded engine; `inplace.load` makes one.

    Calling it takes what the module took, positional or by name, and returns what it returned. States that the caller owns are updated in
    the tensors that are passed: the engine is handed their addresses, anew in each call, so different caches may alternate. States that
    the module owned, its buffers, are held by the engine. An output whose value is a state's is a tensor of its own.

    It is a module whose buffers are those states, so `torch.export.export` takes it: the program has one ``inplace::execute``, which holds
    the engine file. ``torch.export.save`` and ``load`` work as for any program, after ``import inplace.standalone`` in the process that loads.

    Not thread-safe where the engine holds states.

    Attributes:
        manifest: what the engine is.
        held: the same states as buffers, under the module's own names.
    """

    def __init__(
        self, folder: Path, manifest: StandaloneManifest, runner: Runner, held: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.owned = nn.Module()
        for source, tensor in held.items():
            _register(self.owned, source, tensor)
        self._folder, self._runner, self._checks = folder, runner, Checks(manifest)
        self._inputs = _tree(manifest.call.in_spec, folder)
        self._outputs = _tree(manifest.call.out_spec, folder)
        if (self._inputs.num_leaves, self._outputs.num_leaves) != (
            len(manifest.call.arguments),
            len(manifest.call.results),
        ):
            raise LoadError(
                f"{folder / FILE_NAME}: the trees do not fit the arguments and results; build the engine again"
            )
        self._text = manifest.model_dump_json()
        path = (
            folder / manifest.engine.file
        )  # mapped, not read: only a program that is saved needs the bytes
        self._file = torch.from_file(
            str(path), shared=False, size=manifest.engine.bytes, dtype=torch.uint8
        )
        keep(manifest, self._text, runner)

    @property
    def states(self) -> Mapping[str, Tensor]:
        """The states that it holds, by the buffer's name; they may be written (``.zero_()``), never replaced."""
        owned = [state.source for state in self.manifest.bases if state.owner == "module"]
        return MappingProxyType({source: self.owned.get_buffer(source) for source in owned})

    @classmethod
    def load(cls, folder: Path, *, cuda_graphs: bool = True) -> Self:
        """See `inplace.load`."""
        manifest = StandaloneManifest.load(folder)
        path = manifest.engine.verified(folder)
        return cls(
            folder,
            manifest,
            open_runner(path, manifest, str(path), cuda_graphs=cuda_graphs),
            load_owned_states(folder, manifest),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step.

        Raises:
            CallError: an argument is not what the engine was built for; nothing was written.
            IndexError: a position, whose value only the graph knows, is outside its state (PyTorch). States written before it stay written.
        """
        call = self.manifest.call
        leaves = self._leaves(args, kwargs)
        known = self._checks.check(call.arguments, leaves)
        given = {
            argument.where: leaf for argument, leaf in zip(call.arguments, leaves, strict=True)
        }
        inputs = [given[argument.where] for argument in self.manifest.graph_inputs]
        tensors = [
            given[state.source] if state.owner == "caller" else self.owned.get_buffer(state.source)
            for state in self.manifest.bases
        ]
        for state, tensor in zip(self.manifest.bases, tensors, strict=True):
            if state.owner == "module" and not state.matches(tensor):
                raise CallError(
                    f"the engine's state {state.source} has become {list(tensor.shape)} {tensor.dtype}, the engine was built for "
                    f"{list(state.shape)} {state.dtype}: an engine cannot be converted (half(), to()); build it from the converted module"
                )
        if torch.compiler.is_compiling():  # torch.export too
            found = self._operator(inputs, tensors, known)
        else:
            states = self.manifest.views(tensors)
            named = list(zip(self.manifest.states, states, strict=True))
            check_memory(
                named,
                {
                    f"argument {a.where}": v
                    for a, v in zip(call.arguments, leaves, strict=True)
                    if a.kind == "tensor"
                },
            )
            found = self._runner.run(inputs, states)
        return pytree.tree_unflatten(found, self._outputs)

    def _operator(
        self, inputs: list[Any], states: list[Tensor], known: Mapping[str, Any]
    ) -> list[Any]:
        """The step as one operator, for programs; it is handed the tensors that hold the states, each once."""
        results: list[Any] = []
        for result in self.manifest.call.results:
            if result.kind == "constant":
                results.append(result.value)
            else:
                results.append(self._allocated(result, known))
        numbers = [value for value in inputs if not isinstance(value, Tensor)]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        written = [value for value in results if isinstance(value, Tensor)]
        torch.ops.inplace.execute(self._file, self._text, numbers, tensors, states, written)
        return results

    def _allocated(self, result: Result, known: Mapping[str, Any]) -> Any:
        """Memory for a result, or the number that it is."""
        try:
            extents = [evaluate(extent, known) for extent in result.shape]
        except ValueError as error:
            raise CallError(
                f"a result of the shape {list(result.shape)} cannot be exported ({error}): it depends on values, which only the engine "
                f"knows; call the engine itself"
            ) from error
        if result.dtype is None:
            return extents[0]
        return torch.empty(extents, dtype=result.dtype.as_torch, device=self.manifest.engine.device)

    def save(self, path: Path | str) -> None:
        """Write the engine, with the values its states have now, to another directory or its own.

        Raises:
            LoadError: the directory that it was loaded from is gone or changed, or ``path`` holds something else than such an engine.
            OSError: it cannot be written; what stood there stands.
        """
        target = Path(path)
        check_replaceable(target)
        source = self.manifest.engine.verified(self._folder)
        with publish(target) as folder:
            shutil.copyfile(source, folder / source.name)
            self.manifest.model_copy(
                update={"owned": write_owned_states(folder, self.states)}
            ).save(folder)

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of the manifest, whichever way each argument was passed."""
        call = self.manifest.call
        if len(args) > len(call.parameters):
            raise CallError(
                f"{len(args)} arguments were passed, the engine takes {len(call.parameters)}: {', '.join(call.parameters)}"
            )
        named = dict(zip(call.parameters, args, strict=False))
        if twice := sorted(named.keys() & kwargs.keys()):
            raise CallError(f"argument {twice[0]} was passed twice, by position and by name")
        named.update(kwargs)
        if missing := [name for name in call.parameters if name not in named]:
            raise CallError(
                f"argument {missing[0]} is missing; the engine was built with {', '.join(call.parameters)}"
            )
        if unknown := [name for name in named if name not in call.parameters]:
            raise CallError(
                f"argument {unknown[0]} is not known; the engine was built with {', '.join(call.parameters)}"
            )
        split = call.positional
        tree = (
            tuple(named[name] for name in call.parameters[:split]),
            {name: named[name] for name in call.parameters[split:]},
        )
        try:
            return list(self._inputs.flatten_up_to(tree))
        except ValueError as error:
            raise CallError(
                f"the arguments are nested in another way than at the build: {error}; pass {self._names()}"
            ) from error

    def _names(self) -> str:
        return ", ".join(argument.where for argument in self.manifest.call.arguments)


def _register(module: nn.Module, target: str, tensor: Tensor) -> None:
    *parents, name = target.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.register_buffer(name, tensor)


def _tree(text: str, folder: Path) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except (
        Exception
    ) as error:  # of many types: a class that is not registered here, or a text that is no tree
        raise LoadError(
            f"{folder / FILE_NAME}: the arguments or outputs have a type that cannot be made here ({error}); import the module that "
            f"registers it (torch.export.register_dataclass) before loading"
        ) from error
