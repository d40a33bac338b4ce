"""Triton's idle clock, where it is shorter than a generation: Triton forgets the sequence.

The backend does not, while it generates. Triton's clock starts with a request's arrival, the
backend's with its last answer; both forget an idle sequence of `hasty` after `IDLE`.
"""

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
from inplace.client import NO_RETRY, Client, Sequence
from inplace_builder.tools.tritonserver import TritonServer
from support.engines import Engines
from support.faults import idle_after, stub
from support.generating import (
    ENDLESS,
    PROMPT,
    SOON,
    GrpcStream,
    Output,
    long_stream,
    seconds_until,
)
from support.long import long_except
from support.models import greedy
from support.pool import Deployment, ServerPool
from transformers import LlamaForCausalLM
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

SLOTS, IDLE = 2, 0.8
LONG = 3 * IDLE
"""Processor seconds, about, of a generation of as many tokens as `Forgetting.solo`.

It takes no less, however busy the machine was when they were counted.
"""


@dataclass(frozen=True)
class Forgetting:
    """A server with `hasty`, and what a generation of `PROMPT` is alone."""

    server: TritonServer
    llama: LlamaForCausalLM
    solo: list[int]

    def talk(self) -> GrpcStream:
        return GrpcStream(self.server.grpc_url, "hasty")

    def expected(self, history: list[int], max_tokens: int = 0) -> Output:
        """What transformers generates after a history, as the result of a step or a generation."""
        return Output(
            greedy(self.llama, history, max_tokens or 1), "length" if max_tokens else "step"
        )


@pytest.fixture(scope="module")
def forgetting(engines: Engines, pool: ServerPool) -> Iterator[Forgetting]:
    llama, model = long_stream(engines, SLOTS)

    def hasten(config: pb.ModelConfig) -> None:
        idle_after(config, IDLE)

    with pool.serve(Deployment(model, "hasty", hasten)) as server:
        with GrpcStream(server.grpc_url, "hasty") as talk:
            talk.send("solo", PROMPT, ENDLESS, start=True, end=True)
            process = psutil.Process(stub(server, "hasty"))
            begin, solo = process.cpu_times().user, talk.collect(1).tokens
            while process.cpu_times().user - begin < LONG:
                solo += talk.collect(1).tokens
        assert solo[:300] == greedy(llama, PROMPT, 300)[: len(solo)]
        yield Forgetting(server, llama, solo)


def forgotten(sequence: int | str) -> Output:
    """What Triton answers of a sequence that it does not know."""
    who = f"inference request for sequence {sequence} to model 'hasty'"
    return Output(
        [], error=f"{who} must specify the START flag on the first request of the sequence"
    )


@pytest.mark.parametrize("sequence", long_except(["long"], ["long", 7]))
@pytest.mark.parametrize("now", long_except([6], [0, 6]))
def test_a_generation_that_outlasts_it_says_all_and_a_start_with_key_and_position_goes_on(
    forgetting: Forgetting, sequence: int | str, now: int
) -> None:
    with forgetting.talk() as talk:
        begin = time.monotonic()
        generated = talk.request(
            sequence, PROMPT, len(forgetting.solo), start=True, sequence_key="mine"
        )
        assert time.monotonic() - begin > 1.5 * IDLE
        assert generated == Output(forgetting.solo, "length")
        history = PROMPT + generated.tokens
        for end in (False, True):
            assert talk.request(
                sequence, [7], now, end=end, sequence_key="mine", position=len(history)
            ) == forgotten(sequence)
        result = talk.request(
            sequence, [7], now, start=True, sequence_key="mine", position=len(history)
        )
        more = [7, *result.tokens * bool(now), 8]
        again = talk.request(
            sequence, [8], end=True, sequence_key="mine", position=len(history) + len(more) - 1
        )  # Triton knows it again
    assert result == forgetting.expected([*history, 7], now)
    assert again == forgetting.expected(history + more)


def test_a_generation_that_is_shorter_goes_on_without_until_the_clock_runs_out(
    forgetting: Forgetting,
) -> None:
    with forgetting.talk() as talk:
        generated = talk.request("short", PROMPT, 5, start=True, sequence_key="mine")
        step = talk.request("short", [7], sequence_key="mine")
        assert generated == Output(forgetting.solo[:5], "length")
        history = [*PROMPT, *generated.tokens, 7]
        assert step == forgetting.expected(history)
        time.sleep(1.5 * IDLE)
        assert talk.request("short", [8], sequence_key="mine") == forgotten("short")
        lost = talk.request(
            "short", [8], start=True, end=True, sequence_key="mine", position=len(history)
        )
        assert "INPLACE-" in lost.error  # the backend has forgotten it too


def test_while_it_runs_triton_refuses_what_has_no_start_and_a_start_that_goes_on_waits_for_it(
    forgetting: Forgetting,
) -> None:
    history = PROMPT + forgetting.solo
    with forgetting.talk() as talk, forgetting.talk() as other:
        talk.send("running", PROMPT, len(forgetting.solo), start=True, sequence_key="mine")
        generated = talk.collect(1).tokens
        time.sleep(1.5 * IDLE)
        for ids, max_tokens, end in (([7], 0, False), ([7], 5, False), ([], 0, True)):
            assert other.request(
                "running", ids, max_tokens, end=end, sequence_key="mine"
            ) == forgotten("running")
        other.send("running", [7], start=True, sequence_key="mine", position=len(history))
        with pytest.raises(queue.Empty):
            other.receive(timeout=0.2)
        rest = talk.collect()
        assert (generated + rest.tokens, rest.reason) == (forgetting.solo, "length")
        step = other.collect()
        last = other.request(
            "running", [8], start=True, end=True, sequence_key="mine", position=len(history) + 1
        )
        assert step == forgetting.expected([*history, 7])
        assert last == forgetting.expected([*history, 7, 8])


def test_a_start_without_a_position_takes_the_sequence_from_a_forgotten_generation(
    forgetting: Forgetting,
) -> None:
    with forgetting.talk() as talk, forgetting.talk() as other:
        talk.send("taken", PROMPT, ENDLESS, start=True, sequence_key="mine")
        generated = talk.collect(1).tokens
        time.sleep(1.5 * IDLE)
        assert other.request("taken", [7], sequence_key="mine") == forgotten("taken")
        result = other.request("taken", [1, 2, 3], 5, start=True, sequence_key="mine")
        assert other.request("taken", [], end=True, sequence_key="mine") == Output([], "step")
        assert result == forgetting.expected([1, 2, 3], 5)
        rest = talk.collect()
        before = (generated + rest.tokens)[: len(forgetting.solo)]
        assert (rest.reason, before) == ("ended", forgetting.solo[: len(before)])


def test_a_client_ends_a_sequence_that_triton_has_forgotten(forgetting: Forgetting) -> None:
    """Triton refuses an END without START, of which the backend then hears nothing."""
    with Client(forgetting.server.grpc_url, retry=NO_RETRY) as client:
        sequence = Sequence(client, "hasty")
        generation = sequence.generate(PROMPT, len(forgetting.solo), text=False)
        assert list(generation)
        assert generation.tokens == forgetting.solo
        sequence.close()
    with forgetting.talk() as talk:  # at once, before it would have been idle for long enough
        for number in range(SLOTS):
            assert not talk.request(f"next{number}", [1], start=True).error
        for number in range(SLOTS):
            talk.request(f"next{number}", [], end=True)


def test_a_client_that_drops_a_forgotten_generation_frees_its_slot_at_once(
    forgetting: Forgetting,
) -> None:
    with forgetting.talk() as probe:

        def served() -> bool:
            generated = probe.request("probe", [1], start=True, end=True)
            assert not generated.error or "INPLACE-NO_FREE_SLOT retryable=1" in generated.error
            return not generated.error

        with forgetting.talk() as talk:
            for number in range(SLOTS):
                talk.send(f"dropped {number}", PROMPT, ENDLESS, start=True)
            talk.collect(5)
            time.sleep(1.5 * IDLE)
            assert probe.request("dropped 0", [7]) == forgotten("dropped 0")
            assert not served()
        assert seconds_until(served) < SOON
