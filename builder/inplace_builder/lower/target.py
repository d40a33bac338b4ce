"""What a plan is compiled for: the GPU of this machine, or with TensorRT for RTX one that is not here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from inplace.artifacts import File, Plan, Profile
from inplace.trt import Flavor, TensorRT, load_tensorrt

from inplace_builder.errors import BuildError


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
            return cls(tensorrt, "{}.{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name())
        if not tensorrt.is_rtx:
            raise BuildError("only TensorRT for RTX compiles for a GPU that is not there; choose engine tensorrt_rtx, or build on that GPU")
        found = cls(tensorrt, compute_capability, "")
        known = [name for name in tensorrt.api.ComputeCapability.__members__ if name.startswith("SM")]
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
