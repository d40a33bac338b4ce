"""Copies of slots on a GPU: one launch for all states of one shape."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inplace.kernels.copy import CopySpec, addresses, copy
from inplace.schema.specs import StateSpec


@dataclass(frozen=True)
class _Group:
    """States that one launch copies.

    Attributes:
        spec: of each of them.
        states: the states.
        addresses: of their tensors in the arena, on the device.
    """

    spec: CopySpec
    states: list[StateSpec]
    addresses: Tensor


class SlotCopies:
    """Copies slots of an arena, on the current stream.

    Args:
        states: the states.
        tensors: state name → tensor ``[slots, *shape]``, which must stay where it is.
        device: a GPU.
    """

    def __init__(
        self, states: Iterable[StateSpec], tensors: Mapping[str, Tensor], device: torch.device
    ) -> None:
        groups: dict[CopySpec, list[StateSpec]] = {}
        for state in states:
            groups.setdefault(CopySpec.of(state), []).append(state)
        self._device = device
        self._groups = [
            _Group(spec, each, addresses((tensors[state.name] for state in each), device))
            for spec, each in groups.items()
        ]

    def copy(self, source: int, target: int, length: int | None) -> None:
        """See `inplace.engines.arena.Arena.copy`."""
        for group in self._groups:
            copy(
                group.spec,
                sources=group.addresses,
                targets=group.addresses,
                source=source,
                target=target,
                length=group.spec.used(length),
                source_extent=group.spec.extent,
                target_extent=group.spec.extent,
            )

    def save(self, slot: int, length: int | None) -> dict[str, Tensor]:
        """See `inplace.engines.arena.Arena.save_used`."""
        saved = dict[str, Tensor]()
        for group in self._groups:
            used = group.spec.used(length)
            tensors = {
                state.name: torch.empty(
                    state.used_shape(length), dtype=state.dtype.as_torch, device=self._device
                )
                for state in group.states
            }
            copy(
                group.spec,
                sources=group.addresses,
                targets=addresses(tensors.values(), self._device),
                source=slot,
                length=used,
                source_extent=group.spec.extent,
                target_extent=used,
            )
            saved |= tensors
        return saved

    def restore(self, slot: int, saved: Mapping[str, Tensor], length: int | None) -> None:
        """See `inplace.engines.arena.Arena.restore_used`."""
        for group in self._groups:
            used = group.spec.used(length)
            tensors = [saved[state.name].contiguous() for state in group.states]
            copy(
                group.spec,
                sources=addresses(tensors, self._device),
                targets=group.addresses,
                target=slot,
                length=used,
                source_extent=used,
                target_extent=group.spec.extent,
            )
            for tensor in tensors:  # another thread, with a stream of its own, may have made it
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(self._device))
