"""Operations, and the TensorRT plugins made of them (``IPluginV3``, TensorRT 10.3 and later).

An `Operation` says what a plugin answers to TensorRT and launches its kernels; it knows nothing of
TensorRT, so that it can be tested on a machine without a GPU.

Python must keep alive every plugin object that TensorRT was given or that ``clone`` returned.
TensorRT holds no reference to them, and a collected one corrupts the heap. `Plugins` keeps them for
the life of the process, as TensorRT's registry keeps the creators.
"""

import contextlib
import logging
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from inplace.kernels.memory import Memory, Pointer
from inplace.trt import TensorRT

NAMESPACE, PLUGIN_VERSION = "", "1"


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


Shape = tuple[int, ...]


log = logging.getLogger("inplace")


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch.

    Attributes:
        shapes: shapes of the inputs.
        inputs, outputs: their addresses and dtypes.
        workspace: address of `Operation.workspace` bytes.
        locks: int32 counters, `Operation.locks` of them. They are zero before the first launch, and
            every launch leaves them zero.
        pdl: launch kernels with programmatic dependent launch.
    """

    shapes: Sequence[Shape]
    inputs: Sequence[Pointer]
    outputs: Sequence[Pointer]
    workspace: int
    locks: Pointer
    pdl: bool

    def scratch(self, offset: int, dtype: torch.dtype) -> Memory:
        """The workspace from this byte on."""
        return Pointer(self.workspace + offset, dtype)


@dataclass(frozen=True)
class Operation(ABC):
    """One kind of plugin. Its dataclass fields are stored in the plan, under their names.

    Attributes:
        name: the plugin's name in the plan.
        aliases: output index → index of the input whose memory the output is.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[int, int]] = {}

    @property
    @abstractmethod
    def input_count(self) -> int:
        """The number of inputs."""

    @abstractmethod
    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Whether the tensor at this position may have its dtype, the last of ``dtypes``.

        Positions count inputs first, then outputs; ``dtypes`` has those of earlier positions too.
        """

    @abstractmethod
    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The dtypes of the outputs, from those of the inputs."""

    @abstractmethod
    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The extents of the outputs, each an int or one of the inputs' extents.

        The inputs' extents may be symbolic: an implementation only copies them.
        """

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """Bytes of scratch memory for inputs of up to these shapes."""
        return 0

    def locks(self) -> int:
        """How many int32 counters a launch needs."""
        return 0

    @abstractmethod
    def launch(self, call: Launch) -> None:
        """Launch the kernels on PyTorch's current stream."""

    def to_fields(self) -> dict[str, int]:
        """The dataclass fields as int32: TensorRT 10.6 returns anything else changed."""
        return {
            field.name: _encoded(getattr(self, field.name), field.metadata.get("choices"))
            for field in fields(self)
        }

    @classmethod
    def from_fields(cls, values: Mapping[str, int]) -> Self:
        """The inverse of `to_fields`."""
        return cls(
            **{
                f.name: _decoded(values[f.name], f.type, f.metadata.get("choices"))
                for f in fields(cls)
            }
        )


def num_tokens(shape: Shape) -> int:
    """The product of all extents but the last."""
    return prod(shape[:-1])


def _encoded(value: object, choices: Sequence[str] | None) -> int:
    if isinstance(value, str):
        assert choices is not None
        return choices.index(value)
    if isinstance(value, float):
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    assert isinstance(value, int)
    return int(value)


def _decoded(value: int, kind: object, choices: Sequence[str] | None) -> Any:
    if choices is not None:
        return choices[value]
    if kind is float:
        return struct.unpack("<f", struct.pack("<i", value))[0]
    return bool(value) if kind is bool else value


Kind = TypeVar("Kind", bound=type[Operation])


OPERATIONS: dict[str, type[Operation]] = {}
"""Every kind of operation by its name in plans; `register` adds to it."""


class Plugins:
    """The plugins of one TensorRT module, registered with it.

    Attributes:
        errors: texts of the last errors of launches, oldest first.
        failures: how many launches have failed. TensorRT 10.6 reports success for a step in which
            a Python plugin failed, so this is how callers notice.
    """

    def __init__(self, tensorrt: TensorRT) -> None:
        self.tensorrt = tensorrt
        self.errors: deque[str] = deque(maxlen=16)
        self.failures = 0
        self._alias_addresses: set[int] | None = None
        self._alive: list[Any] = []
        self._plugin = _plugin_class(self)
        self._creators: dict[str, Any] = {}
        for kind in OPERATIONS.values():
            self.register(kind)

    def register(self, kind: type[Operation]) -> None:
        """Register a creator, once for each name, so that plans with this kind can be loaded."""
        if kind.name not in self._creators:
            self._creators[kind.name] = _creator(self, kind)
            self.tensorrt.api.get_plugin_registry().register_creator(
                self._creators[kind.name], NAMESPACE
            )

    def make(self, operation: Operation) -> Any:
        """A plugin object for ``add_plugin_v3``, kept alive."""
        plugin = self._plugin(operation)
        self._alive.append(plugin)
        return plugin

    @contextlib.contextmanager
    def observe_aliases(self) -> Iterator[set[int]]:
        """Collect the addresses of aliased inputs that launches get inside the block."""
        self._alias_addresses = set()
        try:
            yield self._alias_addresses
        finally:
            self._alias_addresses = None

    def launch(self, operation: Operation, call: Launch) -> None:
        """Launch an operation.

        Raises:
            RuntimeError: TensorRT bound an aliased output to another address than its input.
        """
        for output, source in operation.aliases.items():
            if call.outputs[output].address != call.inputs[source].address:
                raise RuntimeError(
                    f"{operation.name}: TensorRT bound output {output} to another address than "
                    f"input {source}, whose memory it must be"
                )
            if self._alias_addresses is not None:
                self._alias_addresses.add(call.inputs[source].address)
        operation.launch(call)


_registered: dict[TensorRT, Plugins] = {}


def plugins(tensorrt: TensorRT) -> Plugins:
    """The plugins of this TensorRT, registered once in a process."""
    if tensorrt not in _registered:
        _registered[tensorrt] = Plugins(tensorrt)
    return _registered[tensorrt]


def register(kind: Kind) -> Kind:
    """Register a kind of operation as a plugin. Can be used as a decorator.

    It must be registered where a plan with it is built, and in every process that loads one.

    Args:
        kind: a frozen dataclass. Its fields are integers, floats, booleans, or strings with
            ``metadata={"choices": (...)}``.

    Raises:
        ValueError: another operation has its name.
    """
    if OPERATIONS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"another plugin has the name {kind.name!r}; choose another name")
    for owner in _registered.values():
        owner.register(kind)
    return kind


def _plugin_class(owner: Plugins) -> Any:
    api, tensorrt = owner.tensorrt.api, owner.tensorrt

    class Plugin(
        api.IPluginV3,  # type: ignore[misc, name-defined]
        api.IPluginV3OneCore,  # type: ignore[misc, name-defined]
        api.IPluginV3OneBuildV2,  # type: ignore[misc, name-defined]
        api.IPluginV3OneRuntime,  # type: ignore[misc, name-defined]
    ):
        """One operation as TensorRT sees it."""

        def __init__(self, operation: Operation) -> None:
            for base in (
                api.IPluginV3,
                api.IPluginV3OneCore,
                api.IPluginV3OneBuildV2,
                api.IPluginV3OneRuntime,
            ):
                base.__init__(self)
            self.operation = operation
            self.plugin_name, self.plugin_version, self.plugin_namespace = (
                operation.name,
                PLUGIN_VERSION,
                NAMESPACE,
            )
            self.num_outputs = len(operation.output_dtypes([torch.float32] * operation.input_count))
            # TensorRT keeps the addresses of these arrays.
            self._arrays = [
                np.array([value], dtype=np.int32) for value in operation.to_fields().values()
            ]
            self._locks: torch.Tensor | None = None
            self._pdl: bool | None = None

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            return [
                tensorrt.dtype(dtype)
                for dtype in self.operation.output_dtypes(
                    [tensorrt.torch_dtype(dtype) for dtype in inputs]
                )
            ]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            extents = [[shape[axis] for axis in range(len(shape))] for shape in inputs]
            expressions = []
            for shape in self.operation.output_shapes(extents):
                expression = api.DimsExprs(len(shape))
                for axis, extent in enumerate(shape):
                    expression[axis] = (
                        builder.constant(extent) if isinstance(extent, int) else extent
                    )
                expressions.append(expression)
            return expressions

        def supports_format_combination(
            self, position: int, tensors: Sequence[Any], inputs: int
        ) -> bool:
            if tensors[position].desc.format != api.TensorFormat.LINEAR:
                return False
            try:
                dtypes = [
                    tensorrt.torch_dtype(tensors[index].desc.type) for index in range(position + 1)
                ]
            except KeyError:
                return False
            return self.operation.accepts(position, dtypes)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_aliased_input(self, output: int) -> int:
            return self.operation.aliases.get(output, -1)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            shapes = [tuple(tensor.max) for tensor in inputs]
            return self.operation.workspace(
                shapes, [tensorrt.torch_dtype(tensor.desc.type) for tensor in inputs]
            )

        def get_fields_to_serialize(self) -> Any:
            names = self.operation.to_fields()
            kind = api.PluginFieldType.INT32
            return api.PluginFieldCollection(
                [
                    api.PluginField(name, array, kind)
                    for name, array in zip(names, self._arrays, strict=True)
                ]
            )

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def clone(self) -> Any:
            return owner.make(self.operation)

        def set_tactic(self, tactic: int) -> None:
            pass

        def enqueue(
            self,
            inputs: Sequence[Any],
            outputs: Sequence[Any],
            sources: Sequence[int],
            targets: Sequence[int],
            workspace: int,
            stream: int,
        ) -> int:
            try:
                shapes: list[Shape] = [tuple(tensor.dims) for tensor in inputs]
                with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                    if self._locks is None:  # in the first enqueue, which is never captured
                        self._locks = torch.zeros(
                            max(1, self.operation.locks()), dtype=torch.int32, device="cuda"
                        )
                        self._pdl = torch.cuda.get_device_capability() >= (9, 0)
                    call = Launch(
                        shapes=shapes,
                        inputs=[
                            Pointer(a, tensorrt.torch_dtype(t.type))
                            for a, t in zip(sources, inputs, strict=True)
                        ],
                        outputs=[
                            Pointer(a, tensorrt.torch_dtype(t.type))
                            for a, t in zip(targets, outputs, strict=True)
                        ],
                        workspace=workspace,
                        locks=Pointer(self._locks.data_ptr(), torch.int32),
                        pdl=bool(self._pdl),
                    )
                    owner.launch(self.operation, call)
            except Exception as error:  # an exception must not cross into TensorRT
                owner.failures += 1
                owner.errors.append(f"{self.operation.name}: {type(error).__name__}: {error}")
                log.exception("%s failed", self.operation.name)
                return 1
            return 0

    return Plugin


def _creator(owner: Plugins, kind: type[Operation]) -> Any:
    api = owner.tensorrt.api

    class Creator(api.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        """Creates plugins of this kind when a plan is loaded."""

        def __init__(self) -> None:
            api.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = (
                kind.name,
                PLUGIN_VERSION,
                NAMESPACE,
            )
            self._empty = np.array([], dtype=np.int32)
            names = kind.__dataclass_fields__
            self.field_names = api.PluginFieldCollection(
                [api.PluginField(name, self._empty, api.PluginFieldType.INT32) for name in names]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return owner.make(
                kind.from_fields(
                    {field.name: int(np.asarray(field.data).reshape(-1)[0]) for field in fields}
                )
            )

    return Creator()
