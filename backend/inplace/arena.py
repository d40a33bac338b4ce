"""The arena: the memory of all slots of all states of one model instance, allocated once."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from inplace.errors import LoadError
from inplace.specs import StateSpec


class Arena:
    """All slots of all states, at addresses that never change.

    Args:
        states: what to hold.
        slots: sequences to have room for.
        device: where.

    Raises:
        LoadError: the device has not enough free memory.

    Attributes:
        tensors: state name → tensor ``[slots, *shape]``, filled with the state's ``fill``.
    """

    def __init__(self, states: tuple[StateSpec, ...], slots: int, device: torch.device) -> None:
        self.specs = states
        self.slots = slots
        tensors: dict[str, Tensor] = {}
        needed = slots * sum(spec.slot_bytes for spec in states)
        try:
            if device.type == "cpu" and needed > (available := _available()):
                raise MemoryError(f"{available:,} are available")  # the kernel would grant it and kill the process when it is used
            for spec in states:
                tensor = torch.empty((slots, *spec.shape), dtype=spec.dtype.as_torch, device=device)
                tensors[spec.name] = tensor.fill_(spec.fill)  # also commits the pages: memory does not grow while serving
        except (RuntimeError, MemoryError) as error:  # torch reports exhausted host memory as a RuntimeError
            raise LoadError(
                f"the arena of {slots} slots needs {needed:,} bytes of {device.type} memory, which "
                f"could not be allocated ({str(error).partition(chr(10))[0]}): build with fewer slots or a smaller capacity"
            ) from error
        self._tensors = tensors
        self.tensors: Mapping[str, Tensor] = MappingProxyType(tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all slots of all states."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def addresses(self) -> dict[str, int]:
        """Device address of each state; constant for the arena's life."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def rebind(self, name: str, tensor: Tensor) -> None:
        """Say that a state now lies in another tensor of its shape: only for engines that copy it (kind ``copy``)."""
        self._tensors[name] = tensor

    def reset(self, slot: int) -> None:
        """Make a slot fresh for a new sequence: refill the states that need it (``StateSpec.reset``)."""
        for spec in self.specs:
            if spec.reset:
                self.tensors[spec.name][slot].fill_(spec.fill)


def _available() -> int:
    """Bytes of host memory that could be used now, as the kernel estimates them (``MemAvailable``, proc(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62
