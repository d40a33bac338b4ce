"""Prefix reuse: a prompt begins with the states that an earlier sequence of its salt has left."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code, LoadError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.prefixes import MIN_COPIED_TOKENS
from inplace.schema.prefixes import PrefixOptions
from support.copying import is_poisoned, poison
from support.driving import RecordingEngine, random_tokens
from support.engines import Engines
from support.generating import long_stream
from support.models import CHUNK, SLOTS, Repository, greedy, open_instance
from support.streaming import RecordingChannel, StreamClient
from support.streams import prompt as random_prompt
from torch import Tensor

ALICE: dict[str, Any] = {"sequence_key": "alice"}
BOB: dict[str, Any] = {"sequence_key": "bob"}
LONG = random_tokens(1, 3 * CHUNK)


class Clock:
    """Seconds that a test sets."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Reusing(StreamClient):
    """A stream driver that reuses prefixes, with an arena of NaN."""

    def __init__(self, plain: ModelInstance, options: PrefixOptions | None) -> None:
        self.clock = Clock()
        instance = ModelInstance(
            plain.manifest, plain.arena, RecordingEngine(plain.engine), 1e9, self.clock
        )
        poison(instance)
        if options is not None:
            instance.reuse_prefixes(options)
        super().__init__(StreamDriver(instance, TokenizerConfig(), 64))

    def run(
        self, name: str, ids: list[int], *, start: bool = True, end: bool = True, **parameters: Any
    ) -> Tensor:
        """The logits of a step."""
        channel = self.step(name, ids, start=start, end=end, logits=True, **parameters).wait()
        [outputs] = channel.responses
        logits = outputs["logits"]
        assert isinstance(logits, Tensor)
        return logits

    def computed(self) -> int:
        """Tokens that the engine has computed since the last call."""
        count = sum(map(sum, self.engine.counts))
        self.engine.counts.clear()
        return count

    def reused(self) -> int:
        return int(self.metrics()["inplace_prefix_tokens_total", ""])

    def kept(self) -> int:
        return int(self.metrics()["inplace_slots_kept", ""])


@pytest.fixture(scope="module")
def plain(repository: Repository) -> ModelInstance:
    return open_instance(repository.path / "llama")


@pytest.fixture
def opened(plain: ModelInstance) -> Iterator[list[Reusing]]:
    clients: list[Reusing] = []
    yield clients
    for client in clients:
        client.driver.close()


@pytest.fixture
def client(plain: ModelInstance, opened: list[Reusing]) -> Reusing:
    opened.append(Reusing(plain, PrefixOptions()))
    return opened[-1]


def test_with_the_same_cuts_the_logits_have_the_bits_of_a_fresh_prefill(client: Reusing) -> None:
    rest = random_tokens(2, 11)
    fresh = client.run("fresh", LONG + rest, **BOB)
    client.run("first", LONG, **ALICE)
    client.computed()
    slot = client.engine.slots[-1]
    reused = client.run("second", LONG + rest, **ALICE)
    assert client.computed() == len(rest)
    assert client.engine.slots[-1] == slot  # it has taken the slot over
    assert torch.equal(reused, fresh)
    assert client.reused() == len(LONG)
    whole = client.run("third", LONG + rest, **ALICE)  # the last token is always computed
    assert client.computed() == 1
    assert whole.argmax() == fresh.argmax()


def test_with_other_cuts_the_error_is_that_of_a_fresh_prefill_in_other_company(
    client: Reusing, repository: Repository
) -> None:
    exact = repository.llama.double()
    try:
        for seed in range(4):
            ids = random_tokens(10 + seed, 29)
            key: dict[str, Any] = {"sequence_key": str(seed)}
            with torch.no_grad():
                expected = exact(torch.tensor([ids])).logits[0, -1]
            cuts = [client.run("whole", ids, forget=True, **BOB)]
            for first in (3, 13, 28):  # the same tokens, divided in other ways
                client.run("cut", ids[:first], end=False, **BOB)
                cuts.append(client.run("cut", ids[first:], start=False, forget=True, **BOB))
            error = max(float((each[0] - expected).abs().max()) for each in cuts)
            client.run("first", ids[:17], **key)
            reused = client.run("second", ids, **key)
            assert float((reused[0] - expected).abs().max()) <= 2 * error
            top = expected.topk(2).values
            assert reused.argmax() == expected.argmax() or top[0] - top[1] < error
    finally:
        exact.float()


def chat(client: Reusing, turns: int, **parameters: Any) -> tuple[list[list[int]], int]:
    """A conversation that is sent whole in each turn: its answers, and the tokens prefilled."""
    history, answers, prefilled = list[int](), [], 0
    for turn in range(turns):
        history += random_tokens(50 + turn, 3)
        channel = client.generate(f"turn {turn}", history, 3, end=True, **parameters).wait()
        prefilled += client.computed() - 2  # the last token is not fed
        answers.append(channel.tokens)
        history += channel.tokens
    return answers, prefilled


def test_a_chat_of_ten_turns_computes_each_token_once(
    client: Reusing, plain: ModelInstance, opened: list[Reusing], repository: Repository
) -> None:
    answers, prefilled = chat(client, 10, **ALICE)
    client.driver.close()
    opened.append(Reusing(plain, None))
    expected, whole = chat(opened[-1], 10, **ALICE)
    assert answers == expected
    assert answers[0] == greedy(repository.llama, random_tokens(50, 3), 3)
    assert (prefilled, whole) == (3 + 9 * 4, sum(3 + 6 * turn for turn in range(10)))


def test_the_answer_says_how_many_tokens_were_reused(client: Reusing) -> None:
    outputs, prompt = frozenset({"tokens", "reused_tokens", "finish_reason"}), LONG
    for name, expected in (("first", 0), ("second", len(LONG) + 3)):
        channel = client.generate(
            name, prompt, 4, end=True, requested_outputs=outputs, **ALICE
        ).wait()
        prompt = [*prompt, *channel.tokens, 7]
        numbers = [response.get("reused_tokens") for response in channel.responses]
        assert numbers[:-1] == [None] * (len(numbers) - 1)
        assert isinstance(numbers[-1], Tensor)
        assert numbers[-1].tolist() == [[expected]]


@pytest.mark.parametrize(
    ("first", "second", "without_key", "shares"),
    [
        (ALICE, ALICE, False, True),
        (ALICE, BOB, False, False),
        (ALICE, {}, False, False),
        (ALICE, {}, True, False),
        ({}, {}, False, False),
        ({}, {}, True, True),
        ({"cache_salt": "s"}, {"cache_salt": "s"}, False, False),
        (ALICE | {"cache_salt": "s"}, ALICE | {"cache_salt": "s"}, False, True),
        (ALICE | {"cache_salt": "s"}, ALICE | {"cache_salt": "t"}, False, False),
        (ALICE | {"cache_salt": "s"}, ALICE, False, False),
        (ALICE | {"cache_salt": "s"}, BOB | {"cache_salt": "s"}, False, False),
        (ALICE, {"cache_salt": "alice"}, True, False),
        (ALICE | {"cache_salt": "\ud800"}, ALICE | {"cache_salt": "?"}, False, False),
        (ALICE | {"forget": True}, ALICE, False, False),
        (ALICE | {"forget": False}, ALICE, False, True),
    ],
)
def test_only_sequences_of_one_salt_share(
    plain: ModelInstance,
    opened: list[Reusing],
    first: dict[str, Any],
    second: dict[str, Any],
    without_key: bool,
    shares: bool,
) -> None:
    opened.append(client := Reusing(plain, PrefixOptions(without_key=without_key)))
    client.run("first", LONG, **first)
    client.computed()
    client.run("second", [*LONG, 7], **second)
    assert client.computed() == (1 if shares else len(LONG) + 1)
    assert client.reused() == (len(LONG) if shares else 0)


@pytest.mark.long
def test_the_time_to_the_first_token_tells_nothing_of_other_tenants(
    engines: Engines, opened: list[Reusing]
) -> None:
    """Processor time: others run on the machine too."""
    _, model = long_stream(engines, 8)
    opened.append(client := Reusing(open_instance(model), PrefixOptions()))
    took: dict[str, list[float]] = {"fresh": [], "other tenant": [], "again": []}
    for number in range(9):
        ids = random_prompt(number, 640)
        for name, key in (("fresh", ALICE), ("other tenant", BOB), ("again", ALICE)):
            begin = time.process_time()
            client.generate(f"{name} {number}", ids, 1, end=True, **key).wait()
            took[name].append(time.process_time() - begin)
    fresh, other, again = map(statistics.median, took.values())
    assert again < 0.5 * fresh, took
    assert other > 0.75 * fresh, took


def test_a_part_of_a_kept_prefix_is_copied_and_the_slot_stays(client: Reusing) -> None:
    length = MIN_COPIED_TOKENS + 1
    client.run("first", LONG, **ALICE)
    other = [*LONG[:length], *random_tokens(3, 4)]
    assert LONG[length] != other[length]
    client.computed()
    copied = client.run("second", other, **ALICE)
    assert client.computed() == 4
    assert copied.argmax() == client.run("fresh", other, **BOB).argmax()
    assert client.kept() == 3
    client.computed()
    client.run("third", [*LONG, 5], **ALICE)
    assert client.computed() == 1
    client.run("fourth", [*LONG[: MIN_COPIED_TOKENS - 1], 0, 0], **ALICE)  # too few to copy
    assert client.computed() == MIN_COPIED_TOKENS + 1


def test_the_prefix_of_a_live_sequence_is_copied(
    client: Reusing, plain: ModelInstance, repository: Repository
) -> None:
    client.run("owner", LONG, end=False, **ALICE)
    client.computed()
    tokens = client.generate("other", [*LONG, 3], 4, **ALICE).wait().tokens
    assert client.computed() == 1 + 3
    assert tokens == greedy(repository.llama, [*LONG, 3], 4)
    again = client.generate("owner", [3], 4, start=False, **ALICE).wait().tokens
    assert again == tokens
    table = client.driver.instance.table
    owned = [table.find(name).slot for name in ("owner", "other")]
    others = [slot for slot in range(SLOTS) if slot not in owned]
    assert all(is_poisoned(tensor[others]) for tensor in plain.arena.tensors.values())


def test_kept_slots_are_free_and_the_longest_unused_goes_first(client: Reusing) -> None:
    for index in range(3 * SLOTS):
        client.run(str(index), [*LONG, index], sequence_key=f"tenant {index}")
    assert client.kept() == client.num_free_slots() == SLOTS
    client.computed()
    newest, oldest = 3 * SLOTS - 1, 2 * SLOTS
    client.run("a", [*LONG, newest, 1], end=False, sequence_key=f"tenant {newest}")
    assert client.computed() == 1
    client.run("b", LONG, end=False, **ALICE)  # takes the place of the oldest
    client.computed()
    client.run("c", [*LONG, oldest, 1], end=False, sequence_key=f"tenant {oldest}")
    assert client.computed() == len(LONG) + 2
    names = [f"live {index}" for index in range(SLOTS - 3)]
    for name in names:
        client.run(name, LONG, end=False, **BOB)
    assert (client.kept(), client.num_free_slots()) == (0, 0)
    client.step("full", LONG, start=True, **BOB).wait().assert_refused(
        Code.NO_FREE_SLOT, retryable=True
    )


def test_slots_are_kept_for_a_time_and_a_salt_has_its_share(
    plain: ModelInstance, opened: list[Reusing]
) -> None:
    opened.append(client := Reusing(plain, PrefixOptions(seconds=10.0, slots=2)))
    prompts = [random_tokens(20 + index, 20) for index in range(3)]
    for index, prompt in enumerate(prompts):
        client.run(str(index), prompt, **ALICE)
    assert client.kept() == 2
    client.run("bob", prompts[0], **BOB)
    assert client.kept() == 3
    client.computed()
    client.run("gone", [*prompts[0], 1], **ALICE)
    assert client.computed() == 21
    client.clock.seconds = 9.0
    client.run("used", [*prompts[2], 1], **ALICE)
    assert client.computed() == 1
    client.clock.seconds = 11.0
    client.run("still", [*prompts[2], 1, 2], **ALICE)
    assert client.computed() == 1
    client.clock.seconds = 30.0
    client.run("late", [*prompts[2], 1, 2, 3], **ALICE)
    assert client.computed() == 23
    assert client.kept() == 1


def test_a_sequence_that_is_replaced_or_cancelled_leaves_its_prefix(client: Reusing) -> None:
    client.run("same", LONG, end=False, **ALICE)
    client.computed()
    client.run("same", [*LONG, 4], **ALICE)  # a START on the live id
    assert client.computed() == 1
    running: RecordingChannel = client.generate("cut", [*LONG, 4, 5], 30, **ALICE)
    running.wait_for_tokens(2)
    running.client_cancelled = True
    assert running.wait().finish_reason in ("cancelled", "length")
    client.computed()
    client.run("again", [*LONG, 4, 5, *running.tokens[:1], 6], **ALICE)
    assert client.computed() == 1


@pytest.mark.parametrize(
    ("flags", "parameters", "message"),
    [
        ({"start": False}, {"cache_salt": "s"}, "belongs to a START"),
        ({"start": True}, {"cache_salt": "s", "from": "x"}, "belongs to a START without 'from'"),
        ({"start": True}, {"forget": True}, "belongs to an END"),
        ({"start": True}, {"forget": "maybe"}, "expected true or false"),
        ({"start": True}, {"cache_salt": ""}, "expected a text of 1 to 256"),
    ],
)
def test_parameters_in_the_wrong_request_are_refused(
    client: Reusing, flags: dict[str, bool], parameters: dict[str, Any], message: str
) -> None:
    channel = client.step("one", LONG, **flags, **parameters, **ALICE).wait()
    channel.assert_refused(Code.BAD_PARAMETER, message)


def test_an_end_without_tokens_forgets_too(client: Reusing) -> None:
    client.run("one", LONG, end=False, **ALICE)
    client.end("one", forget=True, **ALICE).wait()
    assert client.kept() == 0


def test_models_whose_states_depend_on_more_than_tokens_refuse_the_setting(
    plain: ModelInstance, sums: StepDriver
) -> None:
    lookahead = ModelInstance(plain.manifest, plain.arena, plain.engine, 1e9)
    lookahead.program = lookahead.program.model_copy(update={"lookahead": True})
    for instance in (sums.instance, lookahead):
        with pytest.raises(LoadError, match="leave prefix_reuse out"):
            instance.reuse_prefixes(PrefixOptions())


@pytest.mark.parametrize("tokens", [[], [4]])
def test_an_end_whose_forget_cannot_be_read_frees_its_slot_and_keeps_nothing(
    client: Reusing, tokens: list[int]
) -> None:
    client.run("one", LONG, end=False, **ALICE)
    channel = client.step("one", tokens, end=True, forget="maybe", **ALICE).wait()
    channel.assert_refused(Code.BAD_PARAMETER, "expected true or false")
    assert (client.kept(), client.num_free_slots()) == (0, SLOTS)
