"""Two instances of one stream model: each has its arena, and a sequence stays in one of them.

The log says which instance a sequence was given to, and which one finished each generation.
"""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from support.engines import Engines
from support.faults import stubs
from support.generating import ENDLESS, GrpcStream, Output, long_stream
from support.models import greedy
from support.observed import Found, Observed
from support.pool import Deployment, ServerPool
from support.streams import prompt
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

MODEL = "stream_twins"
SLOTS, MANY = 8, 12
BOTH = (0, 1)
MAX_FETCHING = 8  # as in `inplace.server.generate_proxy`
LIVE, FREE, STARTED = (
    ("inplace_sequences_live", ""),
    ("inplace_slots_free", ""),
    ("inplace_sequences_started_total", ""),
)


@dataclass(frozen=True)
class Twins:
    """A server with `twins`, whose counters begin at 0 and go on from test to test."""

    observed: Observed
    llama: LlamaForCausalLM

    def talk(self) -> GrpcStream:
        return GrpcStream(self.observed.server.grpc_url, MODEL)

    def expected(self, history: list[int], max_tokens: int) -> Output:
        return Output(greedy(self.llama, history, max_tokens), "length")

    def now(self, instance: int) -> Found:
        return self.observed.numbers(MODEL, f"_0_{instance}")

    def settles(self, instance: int, expected: Found) -> Found:
        result = self.observed.settled(MODEL, expected, f"_0_{instance}")
        assert {key: result[key] for key in expected} == expected
        return result

    def logged(self, event: str, name: str, least: int) -> list[tuple[int, str]]:
        """The instance and the sequence of each such event, in order.

        Of sequences whose id begins with ``name``.
        """
        pattern = rf"\w(\d): {event}: sequence=({name}\d+)\b.*"
        return [
            (int(instance), of)
            for line in self.observed.lines(MODEL, pattern, least)
            for instance, of in re.findall(pattern, line)
        ]

    def home(self, name: str, sequences: int) -> dict[str, int]:
        """The instance of each sequence."""
        started = self.logged("sequence started", name, sequences)
        assert len(started) == sequences
        return {sequence: instance for instance, sequence in started}


@pytest.fixture(scope="module")
def twins(engines: Engines, pool: ServerPool) -> Iterator[Twins]:
    llama, model = long_stream(engines, SLOTS)

    def double(config: pb.ModelConfig) -> None:
        config.instance_group[0].count = 2
        config.parameters["log_level"].string_value = "debug"

    with (
        pool.serve(Deployment(model, MODEL, double, proxy=True)) as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        assert len(stubs(server, MODEL)) == 2
        yield Twins(Observed(server, client, pool.repository), llama)


def test_many_generations_over_both_each_say_what_they_say_alone_and_stay_where_they_began(
    twins: Twins,
) -> None:
    rounds = 2
    before = [twins.now(instance) for instance in BOTH]

    def one(seed: int) -> list[tuple[list[int], Output]]:
        """Generations on one sequence, over a stream each: histories and results."""
        history, collected = prompt(seed, 3 + 4 * seed), []
        for number in range(rounds):
            parameters = {"position": len(history) - 2} if number else {}
            with twins.talk() as talk:
                ids = history[-2:] if number else history
                generated = talk.request(
                    f"many{seed}",
                    ids,
                    12 + seed,
                    start=not number,
                    end=number == rounds - 1,
                    **parameters,
                )
            collected.append((history, generated))
            history = [*history, *generated.tokens, 5, seed]
        return collected

    with ThreadPoolExecutor(MANY) as pool:
        answers = list(pool.map(one, range(MANY)))
    for seed, answer in enumerate(answers):
        for history, generated in answer:
            assert generated == twins.expected(history, 12 + seed)

    home = twins.home("many", MANY)
    assert set(home.values()) == set(BOTH)
    finished = Counter(twins.logged("generation finished", "many", rounds * MANY))
    assert finished == {(instance, sequence): rounds for sequence, instance in home.items()}
    for instance, was in zip(BOTH, before, strict=True):
        own = [sequence for sequence, where in home.items() if where == instance]
        result = twins.settles(
            instance,
            {
                STARTED: was[STARTED] + len(own),
                ("inplace_generations_total", "length"): was["inplace_generations_total", "length"]
                + rounds * len(own),
                ("inplace_sequences_ended_total", "end"): was[
                    "inplace_sequences_ended_total", "end"
                ]
                + len(own),
                ("inplace_requests_refused_total", "UNKNOWN_SEQUENCE"): 0,
                LIVE: 0,
                FREE: SLOTS,
            },
        )
        assert (
            result["inplace_step_rows_sum", ""] > result["inplace_step_rows_count", ""]
        )  # in company


def test_requests_for_large_responses_delay_no_others_of_the_proxy(twins: Twins) -> None:
    """As many of them as the proxy fetches for at the same time."""
    no_sequence, large = 0, 400
    url, proxy = twins.observed.server.grpc_url, f"{MODEL}_generate"
    with ExitStack() as stack:
        talks = [stack.enter_context(GrpcStream(url, proxy)) for _ in range(MAX_FETCHING)]
        for seed, talk in enumerate(talks):
            talk.send(no_sequence, prompt(seed, 5), ENDLESS, stream_interval=large)
        for talk in talks:
            assert large <= len(talk.receive().tokens) < 2 * large
        with GrpcStream(url, proxy) as other:
            other.send(no_sequence, prompt(1, 5), 10, stream=True)
            assert other.collect() == twins.expected(prompt(1, 5), 10)
        assert [talk.num_pending for talk in talks] == [0] * MAX_FETCHING


def test_cancelled_generations_free_the_slots_of_their_own_instance(twins: Twins) -> None:
    cancelled = ("inplace_sequences_ended_total", "cancelled")
    before = [twins.now(instance) for instance in BOTH]
    with ExitStack() as stack:
        talks = {f"endless{seed}": stack.enter_context(twins.talk()) for seed in range(MANY)}
        for seed, (name, talk) in enumerate(talks.items()):
            talk.send(name, prompt(seed, 5), ENDLESS, start=True)
        generated = {name: talk.collect(1).tokens for name, talk in talks.items()}
        home = twins.home("endless", MANY)
        sizes = Counter(home.values())
        assert set(sizes) == set(BOTH)
        for instance in BOTH:
            twins.settles(
                instance,
                {
                    LIVE: sizes[instance],
                    FREE: SLOTS - sizes[instance],
                    cancelled: before[instance][cancelled],
                },
            )
        for name, talk in talks.items():
            if home[name] == 0:
                talk.drop()
        twins.settles(0, {LIVE: 0, FREE: SLOTS, cancelled: before[0][cancelled] + sizes[0]})
        twins.settles(1, {LIVE: sizes[1], FREE: SLOTS - sizes[1], cancelled: before[1][cancelled]})
        for seed, (name, talk) in enumerate(talks.items()):
            if home[name] == 1:  # these never notice
                generated[name] += talk.collect(50).tokens
                assert generated[name][:50] == twins.expected(prompt(seed, 5), 50).tokens
                assert talk.collect(1).reason == ""
    twins.settles(0, {LIVE: 0, FREE: SLOTS, cancelled: before[0][cancelled] + sizes[0]})
    twins.settles(1, {LIVE: 0, FREE: SLOTS, cancelled: before[1][cancelled] + sizes[1]})


def test_generations_of_one_request_each_get_the_slots_of_both(twins: Twins) -> None:
    """Triton keeps no place for them, so it does not know how many run where."""
    every = 2 * SLOTS
    with ExitStack() as stack:
        talks = [stack.enter_context(twins.talk()) for _ in range(every + 1)]
        for seed, talk in enumerate(talks[:every]):
            talk.send(f"whole{seed}", prompt(seed, 5), ENDLESS, start=True, end=True)
        for seed, talk in enumerate(talks[:every]):
            assert talk.collect(10).tokens[:10] == twins.expected(prompt(seed, 5), 10).tokens
        for instance in BOTH:
            twins.settles(instance, {LIVE: SLOTS, FREE: 0})
        talks[every].send(f"whole{every}", prompt(1, 5), 5, start=True, end=True)
        for talk in talks[:every]:
            talk.drop()
        assert talks[every].collect() == twins.expected(prompt(1, 5), 5)
    for instance in BOTH:
        twins.settles(instance, {LIVE: 0, FREE: SLOTS})


def test_new_sequences_go_to_the_instance_with_most_free_slots(twins: Twins) -> None:
    """Triton divides them evenly, whatever ended where."""
    half = SLOTS // 2
    with ExitStack() as stack:
        talks = {f"first{seed}": stack.enter_context(twins.talk()) for seed in range(SLOTS)}
        for seed, (name, talk) in enumerate(talks.items()):
            talk.send(name, prompt(seed, 5), ENDLESS, start=True, end=True)
            talk.collect(1)
        home = twins.home("first", SLOTS)
        assert list(home.values()).count(0) == half
        for name, talk in talks.items():
            if home[name] == 0:
                talk.drop()
        twins.logged("sequence ended", "first", half)
        following = [stack.enter_context(twins.talk()) for _ in range(half)]
        for seed, talk in enumerate(following):
            talk.send(f"next{seed}", prompt(seed, 5), ENDLESS, start=True, end=True)
            talk.collect(1)
        assert set(twins.home("next", half).values()) == {0}
    for instance in BOTH:
        twins.settles(instance, {LIVE: 0, FREE: SLOTS})
