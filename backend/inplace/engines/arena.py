"""The arena: the memory of all slots of all states of one model instance, allocated once."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inplace.errors import LoadError
from inplace.schema.specs import INITIAL_FILE, StateSpec, Update
from inplace.schema.tensor_file import as_dtype

if TYPE_CHECKING:
    from inplace.engines.slot_copies import SlotCopies


class Arena:
    """All slots of all states, at addresses that never change.

    Args:
        states: the states of the model.
        slots: how many sequences to have room for.
        device: where to allocate.
        initial: the tensors that `StateSpec.initial` names, ``shape`` each.

    Raises:
        LoadError: the device has not enough free memory, or an initial value is missing or has
            another shape or type than its state.

    Attributes:
        device: where it is.
        tensors: state name → tensor ``[slots, *shape]``, each slot with what a fresh one holds.
    """

    def __init__(
        self,
        states: tuple[StateSpec, ...],
        slots: int,
        device: torch.device,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.specs = states
        self.slots = slots
        self.device = device
        self._initial = {
            spec.name: _initial_value(spec, initial or {}).to(device)
            for spec in states
            if spec.initial is not None
        }
        tensors: dict[str, Tensor] = {}
        needed = slots * sum(spec.slot_bytes for spec in states)
        try:
            # Linux grants more memory than there is, and kills the process when it is used.
            if device.type == "cpu" and needed > (left := available_memory()):
                raise MemoryError(f"{left:,} are available")
            for spec in states:
                tensor = torch.empty((slots, *spec.shape), dtype=spec.dtype.as_torch, device=device)
                # Filling also commits the pages, so memory does not grow while serving.
                tensors[spec.name] = self._refill(spec, tensor)
        except (RuntimeError, MemoryError) as error:  # PyTorch raises RuntimeError for host memory
            reason = str(error).partition("\n")[0]
            raise LoadError(
                f"the arena of {slots} slots needs {needed:,} bytes of {device.type} memory, which "
                f"could not be allocated ({reason}): build with fewer slots or a smaller capacity"
            ) from error
        self._tensors = tensors
        self.tensors: Mapping[str, Tensor] = MappingProxyType(tensors)
        self._gpu_copies: SlotCopies | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all slots of all states."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def addresses(self) -> dict[str, int]:
        """Device address of each state; constant for the arena's life."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def rebind(self, name: str, tensor: Tensor) -> None:
        """Replace a state's tensor by another of its shape: for engines with the kind ``copy``."""
        self._tensors[name] = tensor
        self._gpu_copies = None

    def reset(self, slot: int) -> None:
        """Refill a slot for a new sequence, in the states that need it (``StateSpec.reset``)."""
        for spec in self.specs:
            if spec.reset:
                self._refill(spec, self.tensors[spec.name][slot])

    def copy(self, source: int, target: int, length: int | None) -> None:
        """Copy a slot to another one, on the device.

        Args:
            source: the slot to copy.
            target: a slot without an owner; the source itself, of which fewer positions are used.
            length: positions that the source holds: of states that append, only these are copied.
                None copies whole slots.
        """
        if source != target and (copies := self._copies_on_gpu()) is not None:
            copies.copy(source, target, length)
        elif source != target:
            for spec in self.specs:
                old, new = self.tensors[spec.name][source], self.tensors[spec.name][target]
                _used(spec, new, length).copy_(_used(spec, old, length))
        if length is not None:
            self._refill_behind(target, length)

    def _refill_behind(self, slot: int, length: int) -> None:
        """Refill the positions that are not used, in the states that need it."""
        for spec in self.specs:
            if spec.reset and spec.update is Update.APPEND and spec.axis is not None:
                rest = spec.shape[spec.axis] - length
                tensor = self.tensors[spec.name][slot].narrow(spec.axis, length, rest)
                value = self._initial.get(spec.name)
                if value is None:
                    tensor.fill_(spec.fill)
                else:
                    tensor.copy_(value.narrow(spec.axis, length, rest))

    def save_used(self, slot: int, length: int | None) -> dict[str, Tensor]:
        """Copies of all states of a slot by name, on the device.

        Args:
            slot: the slot.
            length: of states that append, only so many positions are copied; None for all.
        """
        if (copies := self._copies_on_gpu()) is not None:
            return copies.save(slot, length)
        return {
            spec.name: _used(spec, self.tensors[spec.name][slot], length).clone()
            for spec in self.specs
        }

    def restore_used(self, slot: int, saved: Mapping[str, Tensor], length: int | None) -> None:
        """Write what `save_used` has copied into a slot, and what a fresh one holds behind it."""
        if (copies := self._copies_on_gpu()) is not None:
            copies.restore(slot, saved, length)
        else:
            for spec in self.specs:
                _used(spec, self.tensors[spec.name][slot], length).copy_(saved[spec.name])
        if length is not None:
            self._refill_behind(slot, length)

    def _copies_on_gpu(self) -> "SlotCopies | None":
        """Copies by kernels, if the arena is on a GPU."""
        if self.device.type == "cuda" and self._gpu_copies is None:
            from inplace.engines.slot_copies import SlotCopies  # needs Triton-language

            self._gpu_copies = SlotCopies(self.specs, self.tensors, self.device)
        return self._gpu_copies

    def save(self, slot: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some states of a slot, by name."""
        return {name: self.tensors[name][slot].clone() for name in names}

    def restore(self, slot: int, saved: Mapping[str, Tensor]) -> None:
        """Put back what `save` has copied."""
        for name, tensor in saved.items():
            self.tensors[name][slot].copy_(tensor)

    def _refill(self, spec: StateSpec, tensor: Tensor) -> Tensor:
        """Write what a fresh slot holds into a slot, or into all of them."""
        value = self._initial.get(spec.name)
        return tensor.fill_(spec.fill) if value is None else tensor.copy_(value)


def _used(spec: StateSpec, tensor: Tensor, length: int | None) -> Tensor:
    """The first positions of a slot's state, if it appends; else all of it."""
    if spec.update is not Update.APPEND or spec.axis is None or length is None:
        return tensor
    return tensor.narrow(spec.axis, 0, length)


def _initial_value(spec: StateSpec, initial: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a state begins with."""
    value = initial.get(str(spec.initial))
    if value is None:
        raise LoadError(
            f"state {spec.name} begins with the tensor {spec.initial!r}, and {INITIAL_FILE} has "
            f"only {sorted(initial)}; build the model again"
        )
    value = as_dtype(value, spec.dtype)
    if (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype.as_torch):
        raise LoadError(
            f"state {spec.name} is {list(spec.shape)} {spec.dtype}, and the tensor "
            f"{spec.initial!r} that it begins with is {list(value.shape)} {value.dtype}; build the "
            "model again"
        )
    return value


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process could use now.

    The smallest of the kernel's estimate for the machine (``MemAvailable``, proc(5)) and of what
    each control group of the process has left: a container is killed at its own limit, far below
    the machine's. A group (cgroup v2) has ``memory.max`` less ``memory.current``, plus
    ``inactive_file``, file cache that the kernel can drop.
    """
    limits = [1 << 62]
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError):
        path = next(
            line[3:]
            for line in [*(proc / "self/cgroup").read_text().splitlines(), "0::/"]
            if line.startswith("0::")
        )
        innermost = cgroups / path.lstrip("/")
        for group in (innermost, *innermost.parents):
            # The root group has no such files, and "max" is not a number.
            with contextlib.suppress(OSError, ValueError):
                limit, used = (
                    int((group / name).read_text()) for name in ("memory.max", "memory.current")
                )
                statistics = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
                limits.append(limit - used + int(statistics.get("inactive_file", 0)))
            if group == cgroups:
                break
    return min(limits)
