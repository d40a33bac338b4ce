"""Arenas with states of every kind, whose slots are copied, on any device."""

import torch
from inplace.engines.arena import Arena
from inplace.engines.slot_copies import SlotCopies
from inplace.schema.specs import Dtype, StateSpec, Update
from torch import Tensor

SLOTS, CAPACITY = 3, 40


def state(
    name: str, shape: tuple[int, ...], dtype: Dtype, update: Update, axis: int | None = None
) -> StateSpec:
    return StateSpec(name=name, shape=shape, dtype=dtype, update=update, axis=axis, reset=False)


STATES = (
    *(
        state(f"{part}_{layer}", (2, CAPACITY, 24), Dtype.BFLOAT16, Update.APPEND, 1)
        for part in ("key", "value")
        for layer in range(3)
    ),
    state("narrow", (CAPACITY, 3), Dtype.FLOAT16, Update.APPEND, 0),
    state("bytes", (5, CAPACITY), Dtype.UINT8, Update.APPEND, 1),
    state("flat", (CAPACITY,), Dtype.FLOAT32, Update.APPEND, 0),
    state("ring", (2, 16, 8), Dtype.FLOAT32, Update.RING, 1),
    state("cell", (7, 5), Dtype.FLOAT32, Update.REPLACE),
    state("count", (1,), Dtype.INT64, Update.REPLACE),
)
"""Keys and values of layers, odd rows, a ring, cells."""


def random_arena(device: str, seed: int) -> Arena:
    """An arena whose slots hold random bytes."""
    arena = Arena(STATES, SLOTS, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    for tensor in arena.tensors.values():
        view = tensor.view(torch.uint8)
        view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator))
    return arena


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().view(torch.uint8) for name, tensor in tensors.items()}


def check_copies(device: str, length: int | None) -> None:
    """The kernels' copies have the bytes that PyTorch's have, and change no others."""
    expected, given = random_arena("cpu", 1), random_arena(device, 1)
    copies = SlotCopies(given.specs, given.tensors, given.device)
    expected.copy(2, 0, length)
    copies.copy(2, 0, length)
    saved, own = expected.save_used(1, length), copies.save(1, length)
    assert {name: each.shape for name, each in own.items()} == {
        name: each.shape for name, each in saved.items()
    }
    other = random_arena("cpu", 2).save_used(0, length)
    expected.restore_used(2, other, length)
    copies.restore(2, {name: each.to(device) for name, each in other.items()}, length)
    for left, right in (
        (as_bytes(dict(given.tensors)), as_bytes(dict(expected.tensors))),
        (as_bytes(own), as_bytes(saved)),
    ):
        assert all(torch.equal(left[name], right[name]) for name in right)
