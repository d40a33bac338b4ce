"""Copies of sequences on an engine without a server, compared with sequences that ran alone."""

from typing import Any

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.specs import Update
from inplace.snapshots import Restored
from torch import Tensor

from support.decoding import random_prompt

KEY = "mine"


def feed(
    instance: ModelInstance,
    sequence_id: SequenceId,
    ids: list[int],
    restored: Restored | None = None,
    **parameters: int | str,
) -> Tensor:
    """The logits of a step; a START at position 0, with ``from`` and of a restored sequence."""
    start = parameters.get("position") == 0 or "from" in parameters or restored is not None
    inputs, outputs = {"input_ids": torch.tensor([ids])}, frozenset({"next_token", "logits"})
    parameters = {"sequence_key": KEY, **parameters}
    request = Request(
        sequence_id, start, False, inputs, parameters=parameters, requested_outputs=outputs,
        restored=restored,
    )  # fmt: skip
    active = instance.admit(request)
    while not active.finished:
        instance.step([active])
    instance.finish(active)
    assert active.error is None, active.error
    return active.outputs["logits"].clone()


def poison(instance: ModelInstance) -> None:
    """End all sequences and fill the arena with what a step must not read."""
    for sequence in instance.table.idle_for(0.0):
        instance.table.end(sequence)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def check_copy(instance: ModelInstance, seed: int, length: int) -> None:
    """A sequence and its copy, continued differently, give the bits of sequences that ran alone.

    Other slots keep their bytes, and so do the parts of the copy's slot behind what was used.

    Args:
        instance: a decoder with three slots or more.
        seed: of the tokens.
        length: tokens of the sequence that is copied.
    """
    sizes = (length, 1, 5, 2)
    begin, *rest = (random_prompt(seed + part, size) for part, size in enumerate(sizes))
    expected = []
    for second in rest[1:]:
        poison(instance)
        alone = [feed(instance, "alone", begin, position=0)]
        expected.append([*alone, *(feed(instance, "alone", ids) for ids in (rest[0], second))])
    poison(instance)
    addresses = instance.arena.addresses()
    given = feed(instance, "first", begin, position=0)
    own = [feed(instance, "first", rest[0])]
    # Before the next step of the first one, behind it, and in between.
    source: dict[str, Any] = {"from": "first"}
    copied = feed(instance, "copy", rest[2], position=length + 1, **source)
    _check_unused(instance, length + 1 + len(rest[2]))
    own.append(feed(instance, "first", rest[1]))
    for row, alone in zip(([given, *own], [given, own[0], copied]), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(row, alone, strict=True))
    assert instance.arena.addresses() == addresses


def check_prefix(instance: ModelInstance, seed: int, length: int) -> None:
    """A prompt that begins with all tokens of a kept slot gives the bits of one that is computed.

    One that begins with a part of them uses nothing, where states hold one moment only.

    Args:
        instance: a decoder with states that do not only append.
        seed: of the tokens.
        length: tokens that are reused.
    """
    poison(instance)
    instance.reuse_prefixes(PrefixOptions())
    assert instance.prefixes is not None
    begin, rest = random_prompt(seed, length), random_prompt(seed + 1, 3)
    feed(instance, "alone", begin, position=0, sequence_key="other")
    expected = feed(instance, "alone", rest, sequence_key="other")
    instance.table.end(instance.table.find("alone"))
    feed(instance, "first", begin, position=0)
    instance.table.end(instance.table.find("first"))
    assert torch.equal(feed(instance, "second", begin + rest, position=0), expected)
    instance.table.end(instance.table.find("second"))
    feed(instance, "third", begin, position=0)
    assert instance.observer.metrics.snapshot()["inplace_prefix_tokens_total", ""] == length


def _check_unused(instance: ModelInstance, length: int) -> None:
    """Slots without an owner, and positions behind the copy's, hold what `poison` wrote."""
    owned = {name: instance.table.find(name).slot for name in ("first", "copy")}
    for spec in instance.manifest.states:
        tensor = instance.arena.tensors[spec.name]
        others = [slot for slot in range(len(tensor)) if slot not in owned.values()]
        assert others
        assert is_poisoned(tensor[others])
        if spec.update is Update.APPEND and spec.axis is not None and not spec.reset:
            slot = tensor[owned["copy"]]
            assert is_poisoned(slot.narrow(spec.axis, length, slot.shape[spec.axis] - length))


def is_poisoned(tensor: Tensor) -> bool:
    """Whether a part of the arena holds what `poison` wrote."""
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return bool((tensor == torch.iinfo(tensor.dtype).max).all())
