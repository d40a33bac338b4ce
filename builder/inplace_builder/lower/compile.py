"""From a network to a plan.

What a plan is compiled for: the GPU of this machine, or with TensorRT for RTX one that is not here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from inplace.schema.artifacts import File, Plan, Profile
from inplace.trt import Flavor, TensorRT, load_tensorrt

from inplace_builder.errors import BuildError
from inplace_builder.lower.network import LoweredNetwork

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input in one profile."""


USUAL_LEVEL, OTHER_LEVELS = 3, (3, 5, 1, 0)


BROKEN = re.compile(r"Internal Error \(Assertion")
"""TensorRT has found itself in the wrong (seen with 10.6: `checkSanity`). It goes other ways at other levels, so it is asked again."""


@dataclass(frozen=True)
class CompileOptions:
    """How TensorRT compiles.

    Attributes:
        compute_capabilities: GPUs to compile for, for example ``("SM89", "SM120")``; TensorRT for RTX only, where empty means the GPU
            of this machine.
        plugins: whether the network has plugins whose outputs alias inputs.
        optimization_level: how long TensorRT searches for fast kernels, from 0 to 5; None is its own choice, 3.
    """

    compute_capabilities: tuple[str, ...] = ()
    plugins: bool = False
    optimization_level: int | None = None


def compile_network(
    lowered: LoweredNetwork,
    profiles: Sequence[Mapping[str, Range]],
    options: CompileOptions | None = None,
) -> Any:
    """Build the plan (``IHostMemory``, which has the buffer interface).

    Args:
        lowered: the network.
        profiles: for each profile the shapes of every input that has an unknown extent; none where all are known.
        options: how.

    Raises:
        BuildError: TensorRT cannot build it; has TensorRT's own words.
    """
    options = options or CompileOptions()
    tensorrt, log = lowered.context.tensorrt, lowered.context.log
    asked = USUAL_LEVEL if options.optimization_level is None else options.optimization_level
    for level in (options.optimization_level, *(level for level in OTHER_LEVELS if level != asked)):
        plan = lowered.builder.build_serialized_network(
            lowered.network, _config(lowered, profiles, options, level)
        )
        if plan is not None:
            return plan
        errors = log.last_errors()
        if not BROKEN.search(errors):
            break
    raise BuildError(f"{tensorrt} cannot build the network: {errors}{_explained(lowered, errors)}")


def _config(
    lowered: LoweredNetwork,
    profiles: Sequence[Mapping[str, Range]],
    options: CompileOptions,
    level: int | None,
) -> Any:
    """``IBuilderConfig``.

    Raises:
        BuildError: TensorRT refuses a profile or a GPU.
    """
    tensorrt, builder, log = lowered.context.tensorrt, lowered.builder, lowered.context.log
    api = tensorrt.api
    config = builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # float32 means float32, not 10 bits of mantissa
    if level is not None:
        config.builder_optimization_level = level
    if options.plugins:
        config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, name in enumerate(options.compute_capabilities):
            if not config.set_compute_capability(getattr(api.ComputeCapability, name), index):
                raise BuildError(f"{tensorrt} does not compile for {name}: {log.last_errors()}")
    unknown = {name for name, tensor in _inputs(lowered).items() if -1 in tuple(tensor.shape)}
    for ranges in profiles:
        if missing := sorted(unknown - set(ranges)):
            raise BuildError(f"a profile says nothing of {missing}, whose shapes vary")
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            try:
                profile.set_shape(name, *shapes)
            except ValueError as error:
                raise BuildError(
                    f"{tensorrt} refused the range {shapes} of input {name}: {error}"
                ) from error
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{tensorrt} refused the profile {dict(ranges)}: {log.last_errors()}")
    return config


def _explained(lowered: LoweredNetwork, said: str) -> str:
    """What TensorRT's words mean for the model, where they say that it has no kernel for something."""
    found = re.search(
        r"Could not find any implementation for node \{?(?:ForeignNode\[)?([^\]}]+)", said
    )
    if found is None:
        return ""
    network = lowered.network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    ends = [part.strip() for part in found[1].split("...")]
    named = [
        f"{layer.name} {layer.metadata}".strip()
        for end in ends
        for layer in layers
        if layer.name == end
    ]
    kinds = sorted({state.kind for state in lowered.context.states.values()})
    what = f"the layers from {' to '.join(named)}" if named else f"the layers {found[1]}"
    states = (
        f" States are updated by {' and '.join(kinds)}: another mechanism (alias) makes another network."
        if kinds
        else ""
    )
    return (
        f". It fuses {what} and has no kernel for the whole on this GPU: a limit of this TensorRT, not of the model.{states} "
        f"Or choose another dtype, or a newer TensorRT"
    )


def _inputs(lowered: LoweredNetwork) -> dict[str, Any]:
    network = lowered.network
    return {
        tensor.name: tensor
        for tensor in (network.get_input(index) for index in range(network.num_inputs))
    }


@dataclass(frozen=True)
class Target:
    """A TensorRT and a GPU.

    Attributes:
        tensorrt: what compiles.
        compute_capability: of the GPU, for example ``9.0``.
        gpu: its name; empty where it is compiled for without being here.
    """

    tensorrt: TensorRT
    compute_capability: str
    gpu: str

    @classmethod
    def of(cls, flavor: Flavor, compute_capability: str | None = None) -> Self:
        """The GPU of this machine, or the one with a ``compute_capability``.

        Raises:
            BuildError: there is no GPU here, or this TensorRT does not compile for the one that is named.
            LoadError: TensorRT is not installed.
        """
        tensorrt = load_tensorrt(flavor)
        if compute_capability is None:
            if not torch.cuda.is_available():
                raise BuildError(
                    "a plan is built for the GPU of this machine, and PyTorch sees none here; build there, or let TensorRT for RTX compile "
                    "for another one (engine tensorrt_rtx, compute_capability)"
                )
            return cls(
                tensorrt,
                "{}.{}".format(*torch.cuda.get_device_capability()),
                torch.cuda.get_device_name(),
            )
        if not tensorrt.is_rtx:
            raise BuildError(
                "only TensorRT for RTX compiles for a GPU that is not there; choose engine tensorrt_rtx, or build on that GPU"
            )
        found = cls(tensorrt, compute_capability, "")
        known = [
            name for name in tensorrt.api.ComputeCapability.__members__ if name.startswith("SM")
        ]
        if found.member not in known:
            raise BuildError(
                f"compute_capability is {compute_capability!r}; {tensorrt} compiles for "
                f"{', '.join(f'{name[2:-1]}.{name[-1]}' for name in sorted(known, key=lambda name: int(name[2:])))}"
            )
        return found

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
        """What `CompileOptions` wants: empty for the GPU of this machine."""
        return () if self.here else (self.member,)

    def plan(self, profiles: Sequence[Profile], weights: File | None = None) -> Plan:
        """The record of a plan that was compiled for it."""
        return Plan(
            flavor=self.tensorrt.flavor,
            version=self.tensorrt.api.__version__,
            gpu=self.gpu,
            compute_capability=self.compute_capability,
            profiles=tuple(profiles),
            weights=weights,
        )
