"""Requests to a step driver, and what may be said of its answers."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager

import torch
from inplace.drivers.step import StepDriver
from inplace.engines import NO_OTHER_THREADS, Finish, StepEngine
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import Answer
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from torch import Tensor

from support.models import VOCABULARY, Repository

Open = Callable[..., StepDriver]
BAD = [1, VOCABULARY]
"""Tokens that are refused with VALUE_RANGE."""


def done(outputs: dict[str, Tensor]) -> Finish:
    """A step that has been computed: the caller goes on while its memory is written already, as with a GPU that is fast."""

    def finish(waiting: AbstractContextManager[object]) -> dict[str, Tensor]:
        with waiting:
            return outputs

    return finish


def lost(launched: Finish) -> Finish:
    """A step that fails after its work is done, the worst case: memory has been written by then."""

    def finish(waiting: AbstractContextManager[object]) -> dict[str, Tensor]:
        launched(waiting)
        raise RuntimeError("out of luck\nsecond line")

    return finish


class Watched:
    """A real engine that keeps what each step was given, and fails once when told to.

    Args:
        engine: the real one.
        overlaps: compute each step when it is launched, as an engine whose steps overlap.
    """

    def __init__(self, engine: StepEngine, *, overlaps: bool = False) -> None:
        self._engine, self.overlaps = engine, overlaps
        self.slots: list[list[int]] = []
        self.counts: list[list[int]] = []
        self.fail_at = 0  # the step, counted from now, that fails; 0 is none

    def on_stream(self) -> AbstractContextManager[object]:
        return self._engine.on_stream()

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        self.slots.append(inputs["slots"].tolist())
        if "row_offsets" in inputs:
            self.counts.append(inputs["row_offsets"].diff().tolist())
        launched = self._engine.launch(inputs, wanted)
        if self.overlaps:
            launched = done(launched(NO_OTHER_THREADS))
        self.fail_at -= 1
        return lost(launched) if self.fail_at == 0 else launched


def watched(driver: StepDriver) -> Watched:
    assert isinstance(driver.instance.engine, Watched)
    return driver.instance.engine


def ask(
    sequence: SequenceId,
    ids: list[int],
    *,
    start: bool = False,
    end: bool = False,
    **parameters: bool | int | float | str,
) -> Request:
    return Request(sequence, start, end, {"input_ids": torch.tensor([ids])}, parameters=parameters)


def add(sequence: SequenceId, value: float, *, start: bool = False, end: bool = False) -> Request:
    return Request(sequence, start, end, {"value": torch.full((1, 4), value)})


def outputs(answer: Answer) -> dict[str, Tensor]:
    assert isinstance(answer, dict), answer
    return answer


def token(answer: Answer) -> int:
    return int(outputs(answer)["next_token"])


def total(answer: Answer) -> tuple[list[float], int]:
    found = outputs(answer)
    return found["sum"][0].tolist(), int(found["values"])


def refused(answer: Answer, code: Code, says: str = "", *, retryable: bool = False) -> None:
    assert isinstance(answer, RequestError), answer
    assert (answer.code, answer.retryable) == (code, retryable)
    assert says in str(answer)


def said(repository: Repository, ids: list[int]) -> int:
    """The next token by transformers itself."""
    with torch.no_grad():
        return int(repository.llama(torch.tensor([ids])).logits[0, -1].argmax())


def prompt(seed: int, tokens: int) -> list[int]:
    return torch.randint(
        0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def memory(driver: StepDriver) -> dict[str, Tensor]:
    """Every bit of the arena."""
    return {
        name: tensor.clone().view(torch.uint8)
        for name, tensor in driver.instance.arena.tensors.items()
    }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
