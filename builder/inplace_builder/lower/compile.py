"""Compile a network to a plan, for the GPU of this machine.

TensorRT for RTX can also compile for a GPU that this machine does not have.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from inplace.schema.artifacts import Flavor, Plan, Profile
from inplace.schema.specs import Alias, Lowering
from inplace.trt import TensorRT, load_tensorrt
from torch import Tensor

from inplace_builder.errors import BuildError, LoweringError
from inplace_builder.lower.lowering import LoweredNetwork

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, optimal and largest shape of an input in one optimization profile."""


DEFAULT_LEVEL = 3
"""TensorRT's own default of `CompileOptions.optimization_level`."""


FALLBACK_LEVELS = (3, 5, 1, 0)
"""Optimization levels to try in turn after an internal error."""


INTERNAL_ERROR = re.compile(r"Internal Error \(Assertion")
"""A bug of TensorRT, not of the network (seen with 10.6: ``checkSanity``).

TensorRT takes other paths at other optimization levels, so another level may succeed.
"""


@dataclass(frozen=True)
class CompiledPlan:
    """A plan, and what the manifest of its engine records.

    Attributes:
        content: the plan; has the buffer interface.
        record: what it was compiled for; its weights file is not written yet.
        weights: the weights that it takes as inputs, by name.
        scales: the names of weights that are scales of others, by the names of these.
        aliases: one for each written state.
        lowering: how each state is updated, and why.
        constant_bytes: size of the weights that it holds.
    """

    content: Any
    record: Plan
    weights: Mapping[str, Tensor]
    scales: Mapping[str, str]
    aliases: tuple[Alias, ...]
    lowering: tuple[Lowering, ...]
    constant_bytes: int


@dataclass(frozen=True)
class CompileOptions:
    """How TensorRT compiles.

    Attributes:
        compute_capabilities: GPUs to compile for, for example ``("SM89", "SM120")``. TensorRT for
            RTX only, where empty means the GPU of this machine.
        plugins: whether the network has plugins whose outputs alias inputs.
        optimization_level: how long TensorRT searches for fast kernels, from 0 to 5; None is its
            own default, 3.
    """

    compute_capabilities: tuple[str, ...] = ()
    plugins: bool = False
    optimization_level: int | None = None


def compile_network(
    lowered: LoweredNetwork,
    profiles: Sequence[Mapping[str, Range]],
    options: CompileOptions | None = None,
) -> Any:
    """Build the plan.

    Args:
        lowered: the network.
        profiles: for each profile the shapes of every input with a dynamic extent; other names are
            ignored. None where all extents are known.
        options: how to compile.

    Returns:
        TensorRT's ``IHostMemory``, which has the buffer interface.

    Raises:
        LoweringError: TensorRT cannot build it; has TensorRT's own message.
    """
    options = options or CompileOptions()
    tensorrt, log = lowered.context.tensorrt, lowered.context.log
    first = DEFAULT_LEVEL if options.optimization_level is None else options.optimization_level
    others = [level for level in FALLBACK_LEVELS if level != first]
    for level in (options.optimization_level, *others):
        config = _config(lowered, profiles, options, level)
        plan = lowered.builder.build_serialized_network(lowered.network, config)
        if plan is not None:
            return plan
        message = log.last_errors()
        if not INTERNAL_ERROR.search(message):
            break
    raise LoweringError(
        f"{tensorrt} cannot build the network: {message}{_explanation(lowered, message)}"
    )


def compile_plan(
    lowered: LoweredNetwork,
    target: "Target",
    ranges: Sequence[Mapping[str, Range]],
    profiles: Sequence[Profile],
    lowering: tuple[Lowering, ...],
    optimization_level: int | None = None,
) -> CompiledPlan:
    """Build the plan of a network for a target.

    Args:
        lowered: the network.
        target: the TensorRT and the GPU.
        ranges: as the ``profiles`` of `compile_network`.
        profiles: the same as the manifest records them.
        lowering: how each state is updated.
        optimization_level: as of `CompileOptions`.

    Raises:
        LoweringError: TensorRT cannot build it.
    """
    kinds = {record.kind for record in lowering}
    options = CompileOptions(
        compute_capabilities=target.capabilities,
        plugins=bool(kinds & {"plugin", "user"}),
        optimization_level=optimization_level,
    )
    return CompiledPlan(
        content=compile_network(lowered, ranges, options),
        record=target.plan(profiles),
        weights=lowered.bound_weights,
        scales=lowered.context.scales,
        aliases=lowered.aliases(lowering),
        lowering=lowering,
        constant_bytes=sum(tensor.nbytes for tensor in lowered.context.constants),
    )


def _config(
    lowered: LoweredNetwork,
    profiles: Sequence[Mapping[str, Range]],
    options: CompileOptions,
    level: int | None,
) -> Any:
    """``IBuilderConfig``.

    Raises:
        LoweringError: TensorRT refuses a profile or a GPU.
    """
    tensorrt, log = lowered.context.tensorrt, lowered.context.log
    api = tensorrt.api
    config = lowered.builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # float32 means float32, not 10 bits of mantissa
    if level is not None:
        config.builder_optimization_level = level
    if options.plugins:
        config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, name in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(getattr(api.ComputeCapability, name), index):
                raise LoweringError(f"{tensorrt} does not compile for {name}: {log.last_errors()}")
    dynamic = lowered.dynamic_inputs()
    for ranges in profiles:
        _add_profile(lowered, config, ranges, dynamic)
    return config


def _add_profile(
    lowered: LoweredNetwork, config: Any, ranges: Mapping[str, Range], dynamic: frozenset[str]
) -> None:
    tensorrt = lowered.context.tensorrt
    if missing := sorted(dynamic - set(ranges)):
        raise LoweringError(f"a profile has no shapes for the inputs {missing}, whose shapes vary")
    profile = lowered.builder.create_optimization_profile()
    for name in sorted(dynamic):
        try:
            profile.set_shape(name, *ranges[name])
        except ValueError as error:
            raise LoweringError(
                f"{tensorrt} refused the range {ranges[name]} of input {name}: {error}"
            ) from error
    if config.add_optimization_profile(profile) < 0:
        raise LoweringError(
            f"{tensorrt} refused the profile {dict(ranges)}: {lowered.context.log.last_errors()}"
        )


def _explanation(lowered: LoweredNetwork, message: str) -> str:
    """What TensorRT's message means for the model, if it is that a kernel is missing."""
    match = re.search(
        r"Could not find any implementation for node \{?(?:ForeignNode\[)?([^\]}]+)", message
    )
    if match is None:
        return ""
    network = lowered.network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    ends = [part.strip() for part in match[1].split("...")]
    named = [
        f"{layer.name} {layer.metadata}".strip()
        for end in ends
        for layer in layers
        if layer.name == end
    ]
    kinds = sorted({state.kind for state in lowered.context.states.values()})
    what = f"the layers from {' to '.join(named)}" if named else f"the layers {match[1]}"
    states = (
        f" States are updated by {' and '.join(kinds)}: another mechanism (alias) makes another "
        f"network."
        if kinds
        else ""
    )
    return (
        f". It fuses {what} and has no kernel for the result on this GPU: a limit of this "
        f"TensorRT, not of the model.{states} Or choose another dtype, or a newer TensorRT"
    )


@dataclass(frozen=True)
class Target:
    """A TensorRT and a GPU.

    Attributes:
        tensorrt: what compiles.
        compute_capability: of the GPU, for example ``9.0``.
        gpu: its name; empty where this machine does not have it.
    """

    tensorrt: TensorRT
    compute_capability: str
    gpu: str

    @classmethod
    def of(cls, flavor: Flavor, compute_capability: str | None = None) -> Self:
        """The GPU of this machine, or the one with a ``compute_capability``.

        Raises:
            BuildError: there is no GPU here, or this TensorRT does not compile for the one that is
                named.
            LoadError: TensorRT is not installed.
        """
        tensorrt = load_tensorrt(flavor)
        if compute_capability is None:
            if not torch.cuda.is_available():
                raise BuildError(
                    "a plan is built for the GPU of this machine, and PyTorch sees none here; "
                    "build on a machine with one, or let TensorRT for RTX compile for another GPU "
                    "(engine tensorrt_rtx, compute_capability)"
                )
            major, minor = torch.cuda.get_device_capability()
            return cls(tensorrt, f"{major}.{minor}", torch.cuda.get_device_name())
        if not tensorrt.is_rtx:
            raise BuildError(
                "only TensorRT for RTX compiles for a GPU that this machine does not have; "
                "choose engine tensorrt_rtx, or build on a machine with that GPU"
            )
        target = cls(tensorrt, compute_capability, "")
        members = tensorrt.api.ComputeCapability.__members__
        known = sorted((name for name in members if name.startswith("SM")), key=_sm_number)
        if target.member not in known:
            raise BuildError(
                f"compute_capability is {compute_capability!r}; {tensorrt} compiles for "
                f"{', '.join(f'{name[2:-1]}.{name[-1]}' for name in known)}"
            )
        return target

    @property
    def here(self) -> bool:
        """Whether plans can be run on this machine."""
        return bool(self.gpu)

    @property
    def member(self) -> str:
        """Its name in ``tensorrt.ComputeCapability``."""
        return "SM" + self.compute_capability.replace(".", "")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """For `CompileOptions`: empty for the GPU of this machine."""
        return () if self.here else (self.member,)

    def plan(self, profiles: Sequence[Profile]) -> Plan:
        """The record of a plan that was compiled for it, without a weights file."""
        return Plan(
            flavor=self.tensorrt.flavor,
            version=self.tensorrt.api.__version__,
            gpu=self.gpu,
            compute_capability=self.compute_capability,
            profiles=tuple(profiles),
        )


def _sm_number(member: str) -> int:
    return int(member.removeprefix("SM"))
