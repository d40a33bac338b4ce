"""Requests to a step driver over a recording engine, and checks of its answers."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager

import torch
from inplace.drivers.step_driver import StepDriver
from inplace.engines import NO_OTHER_THREADS, Finish, StepEngine
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import Answer
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from torch import Tensor

from support.models import VOCABULARY, Repository

OpenDriver = Callable[..., StepDriver]


INVALID_TOKENS = [1, VOCABULARY]
"""Tokens that are refused with VALUE_RANGE."""


def completed(outputs: dict[str, Tensor]) -> Finish:
    """A step whose memory is written before anyone waits for it, as on a fast GPU."""

    def finish(gil_released: AbstractContextManager[object]) -> dict[str, Tensor]:
        with gil_released:
            return outputs

    return finish


def failing(launched: Finish) -> Finish:
    """A step that fails after it has written memory, the worst case."""

    def finish(gil_released: AbstractContextManager[object]) -> dict[str, Tensor]:
        launched(gil_released)
        raise RuntimeError("out of luck\nsecond line")

    return finish


class RecordingEngine:
    """A real engine that records what each step is given, and fails once if told to.

    Args:
        engine: the real one.
        overlaps: compute each step when it is launched, as an engine whose steps overlap.

    Attributes:
        slots: the slot of each row, for each step.
        counts: the number of tokens of each row, for each step of a packed program.
        fail_at: which step fails, counted from now; 0 for none.
    """

    def __init__(self, engine: StepEngine, *, overlaps: bool = False) -> None:
        self._engine, self.overlaps = engine, overlaps
        self.slots: list[list[int]] = []
        self.counts: list[list[int]] = []
        self.fail_at = 0

    def on_stream(self) -> AbstractContextManager[object]:
        return self._engine.on_stream()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        self.slots.append(inputs["slots"].tolist())
        if "row_offsets" in inputs:
            self.counts.append(inputs["row_offsets"].diff().tolist())
        launched = self._engine.launch(inputs, requested)
        if self.overlaps:
            launched = completed(launched(NO_OTHER_THREADS))
        self.fail_at -= 1
        return failing(launched) if self.fail_at == 0 else launched


def engine_of(driver: StepDriver) -> RecordingEngine:
    assert isinstance(driver.instance.engine, RecordingEngine)
    return driver.instance.engine


def step_request(
    sequence_id: SequenceId,
    ids: list[int],
    *,
    start: bool = False,
    end: bool = False,
    **parameters: bool | int | float | str,
) -> Request:
    """A step of the tiny Llama."""
    inputs = {"input_ids": torch.tensor([ids])}
    return Request(sequence_id, start, end, inputs, parameters=parameters)


def sum_request(
    sequence_id: SequenceId, value: float, *, start: bool = False, end: bool = False
) -> Request:
    """A step of the accumulator."""
    return Request(sequence_id, start, end, {"value": torch.full((1, 4), value)})


def run_one(driver: StepDriver, request: Request) -> Answer:
    """The answer to a call with one request."""
    return driver.run([request])[0]


def outputs_of(answer: Answer) -> dict[str, Tensor]:
    assert isinstance(answer, dict), answer
    return answer


def next_token(answer: Answer) -> int:
    return int(outputs_of(answer)["next_token"])


def sum_and_count(answer: Answer) -> tuple[list[float], int]:
    outputs = outputs_of(answer)
    return outputs["sum"][0].tolist(), int(outputs["values"])


def assert_refused(
    answer: Answer, code: Code, message: str = "", *, retryable: bool = False
) -> None:
    assert isinstance(answer, RequestError), answer
    assert (answer.code, answer.retryable) == (code, retryable)
    assert message in str(answer)


def reference_token(repository: Repository, ids: list[int]) -> int:
    """The next token by transformers itself."""
    with torch.no_grad():
        return int(repository.llama(torch.tensor([ids])).logits[0, -1].argmax())


def random_tokens(seed: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (num_tokens,), generator=generator).tolist()


def arena_bytes(driver: StepDriver) -> dict[str, Tensor]:
    """A copy of all memory of the arena, as bytes."""
    return {
        name: tensor.clone().view(torch.uint8)
        for name, tensor in driver.instance.arena.tensors.items()
    }


def same_bytes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
