"""The arena: the memory of all slots of all states of one model instance, allocated once."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from inplace.errors import LoadError
from inplace.schema.specs import StateSpec


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
            if device.type == "cpu" and needed > (left := available()):
                raise MemoryError(
                    f"{left:,} are available"
                )  # the kernel would grant it and kill the process when it is used
            for spec in states:
                tensor = torch.empty((slots, *spec.shape), dtype=spec.dtype.as_torch, device=device)
                tensors[spec.name] = tensor.fill_(
                    spec.fill
                )  # also commits the pages: memory does not grow while serving
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # torch reports exhausted host memory as a RuntimeError
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


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process could use now.

    The least of what the kernel estimates for the machine (``MemAvailable``, proc(5)) and what the control groups that the process is in
    leave it (version 2: ``memory.max`` less ``memory.current``, but for ``inactive_file``, the file cache that can be dropped): a container
    is killed at its own limit, far below the machine's.
    """
    found = [1 << 62]
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError):
        path = next(
            line[3:]
            for line in [*(proc / "self/cgroup").read_text().splitlines(), "0::/"]
            if line.startswith("0::")
        )
        inside = groups / path.lstrip("/")
        for group in (inside, *inside.parents):
            with contextlib.suppress(
                OSError, ValueError
            ):  # the root has no such files, and "max" is no number
                most, used = (
                    int((group / name).read_text()) for name in ("memory.max", "memory.current")
                )
                statistics = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
                found.append(most - used + int(statistics.get("inactive_file", 0)))
            if group == groups:
                break
    return min(found)
