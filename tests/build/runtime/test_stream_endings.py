"""Requests of a stream model that end early have exactly one final response.

They are replaced, cancelled, refused, failed or shut down.
"""

import time

import pytest
import torch
from inplace.drivers import TokenizerConfig
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.models import CAPACITY, CHUNK, SLOTS, VOCABULARY, Repository, greedy, late_token
from support.streaming import (
    MAX_NEW_TOKENS,
    FailingChannel,
    OpenStreams,
    RecordingChannel,
    StreamClient,
    slow_steps,
    wait_until,
)
from support.vocabulary import added, panicking, tiny_tokenizer


def occupy_slots(client: StreamClient) -> None:
    """Start an idle sequence in every slot."""
    for index in range(SLOTS):
        client.step(f"idle{index}", [5], start=True).wait()
    assert client.num_free_slots() == 0


def test_an_end_without_inputs_ends_a_running_generation(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 8)
    with slow_steps(client, 0.02):
        channel = client.generate("a", ids, MAX_NEW_TOKENS).wait_for_tokens(3)
        ended = client.end("a").wait()
    assert (ended.error, ended.responses) == (None, [{}])
    assert channel.finish_reason == "ended"
    assert channel.tokens == greedy(repository.llama, ids, MAX_NEW_TOKENS)[: len(channel.tokens)]
    assert len(channel.tokens) < MAX_NEW_TOKENS
    assert client.num_free_slots() == SLOTS
    client.end("a").assert_refused(Code.UNKNOWN_SEQUENCE)


def test_an_end_with_tokens_is_the_last_step_of_its_sequence(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(2, 8)
    with slow_steps(client, 0.02):
        channel = client.generate("a", ids, MAX_NEW_TOKENS).wait_for_tokens(3)
        last = client.step("a", [3, 4], end=True)
        assert channel.finish_reason == "ended"
    assert last.next_token == greedy(repository.llama, [*ids, *channel.tokens, 3, 4], 1)[0]
    assert client.num_free_slots() == SLOTS


def test_a_start_ends_a_running_generation_of_its_sequence(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    with slow_steps(client, 0.02):
        first = client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS).wait_for_tokens(2)
        second = client.generate("a", random_tokens(2, 9), 5, end=True)
        assert first.finish_reason == "ended"
    assert second.finish_reason == "length"
    assert second.tokens == greedy(repository.llama, random_tokens(2, 9), 5)


def test_an_end_ends_the_queued_generations_too(
    streams: OpenStreams,
) -> None:
    client = streams()
    with slow_steps(client, 0.02):
        channels = [
            client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS).wait_for_tokens(1),
            *(client.generate("a", [3], 2, start=False) for _ in range(3)),
        ]
        client.end("a").wait()
    assert [channel.finish_reason for channel in channels] == ["ended"] * 4
    assert [len(channel.tokens) for channel in channels[1:]] == [0, 0, 0]


def test_end_and_start_without_the_key_change_nothing(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 8)
    channel = client.generate("a", ids, MAX_NEW_TOKENS, sequence_key="mine").wait_for_tokens(2)
    refused = [
        client.end("a"),
        client.end("a", sequence_key="guess"),
        client.generate("a", [1], 1),
    ]
    assert channel.finish_reason == "length"
    assert channel.tokens == greedy(repository.llama, ids, MAX_NEW_TOKENS)
    refused[0].assert_refused(Code.SEQUENCE_KEY)
    refused[1].assert_refused(Code.SEQUENCE_KEY)
    refused[2].assert_refused(Code.SEQUENCE_KEY, retryable=True)
    assert client.end("a", sequence_key="mine").wait().error is None


def test_a_cancelled_generation_frees_its_slot_within_100_ms_and_a_step(
    streams: OpenStreams,
) -> None:
    client, steps = streams(), list[int]()
    engine = client.engine
    with slow_steps(client, 0.02):
        for _ in range(3):
            channel = client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS).wait_for_tokens(2)
            before = len(engine.slots)
            channel.client_cancelled = True
            wait_until(lambda: client.num_free_slots() == SLOTS)
            steps.append(len(engine.slots) - before)
            assert channel.finish_reason == "cancelled"
    assert min(steps) <= 7  # the fewest: other processes may keep the processor busy
    client.step("a", [1]).assert_refused(Code.UNKNOWN_SEQUENCE)


def test_a_waiting_generation_can_be_cancelled(
    streams: OpenStreams,
) -> None:
    client = streams()
    occupy_slots(client)
    first, second = (
        client.generate("w1", random_tokens(1, 3), 2, end=True),
        client.generate("w2", random_tokens(2, 3), 2, end=True),
    )
    first.client_cancelled = True
    assert first.finish_reason == "cancelled"
    assert first.tokens == []
    client.end("idle0").wait()
    assert second.finish_reason == "length"


def test_requests_get_slots_in_the_order_they_arrived(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(9, 3)
    occupy_slots(client)
    client.step("refused", [1], start=True).assert_refused(Code.NO_FREE_SLOT, retryable=True)
    first = client.generate("g0", random_tokens(0, 3), 4, end=True)
    step = client.step("step", ids, start=True)
    last = client.generate("g1", random_tokens(1, 3), 4, end=True)
    rest = [client.step("step", [token]) for token in (3, 4)] + [client.end("step")]
    with slow_steps(client, 0.01):
        client.end("idle0").wait()
        assert first.finish_reason == last.finish_reason == "length"
    assert step.next_token == greedy(repository.llama, ids, 1)[0]
    assert rest[0].next_token == greedy(repository.llama, [*ids, 3], 1)[0]
    assert rest[1].next_token == greedy(repository.llama, [*ids, 3, 4], 1)[0]
    times = [channel.final_at for channel in (first, step, last)]
    assert times == sorted(times)


def test_a_waiting_step_can_be_cancelled(streams: OpenStreams) -> None:
    client = streams()
    occupy_slots(client)
    first = client.generate("g", random_tokens(1, 3), 2, end=True)
    step, after = client.step("step", [1], start=True), client.step("step", [2])
    step.client_cancelled = True
    step.assert_refused(Code.CANCELLED, "while it waited for a slot", retryable=True)
    after.assert_refused(Code.UNKNOWN_SEQUENCE)
    client.end("idle0").wait()
    assert first.finish_reason == "length"
    assert client.num_free_slots() == 1


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"group": ""}, Code.BAD_PARAMETER),
        ({"temprature": 1}, Code.BAD_PARAMETER),
        ({"position": 5, "sequence_key": "mine"}, Code.POSITION),
    ],
)
def test_a_start_that_no_slot_can_help_is_refused_before_those_that_wait(
    streams: OpenStreams, parameters: dict[str, int | str], code: Code
) -> None:
    client = streams()
    occupy_slots(client)
    waiting = client.generate("g", random_tokens(1, 3), 2, end=True)
    step = client.step("step", [1], start=True, **parameters)  # type: ignore[arg-type]
    step.assert_refused(code)
    client.generate("more", [1], 2, **parameters).assert_refused(code)  # type: ignore[arg-type]
    client.step("long", [1] * (CAPACITY + 1), start=True).assert_refused(Code.CAPACITY)
    client.end("idle0").wait()
    assert waiting.finish_reason == "length"
    assert client.num_free_slots() == 1


def test_a_queue_full_of_pipelined_starts_is_emptied_one_by_one(streams: OpenStreams) -> None:
    """Each request that makes room is followed by one of a group that has fewer."""
    number = 1000
    client = streams(max_waiting=number)
    occupy_slots(client)
    first = client.generate("g", random_tokens(1, 3), 2, end=True, group="g")
    for index in range(number):
        client.step(f"s{index}", [1], start=True, group="crowd")
    chained = [
        client.step(f"s{index}", [1], start=True, group=f"own{index}") for index in range(number)
    ]
    client.generate("late", [1], 2, end=True, group="late")
    for index in range(SLOTS):
        client.end(f"idle{index}").wait()
    assert first.finish_reason == "length"
    assert all(
        channel.error is None or channel.error.code is not Code.ENGINE_FAILED for channel in chained
    )


def test_a_cancelled_step_that_has_waited_runs_to_its_end(streams: OpenStreams) -> None:
    client = streams()
    occupy_slots(client)
    client.generate("g", random_tokens(1, 3), 2, end=True)
    with slow_steps(client, 0.1):
        step = client.step("step", [1], start=True)
        client.end("idle0").wait()
        wait_until(lambda: client.driver.instance.table.get("step") is not None)
        step.client_cancelled = True
        assert step.wait().error is None
    assert client.step("step", [2]).wait().error is None


def test_a_full_queue_refuses_and_a_waiting_generation_can_be_replaced(
    streams: OpenStreams,
) -> None:
    client = streams(max_waiting=2)
    occupy_slots(client)
    waiting = [
        client.generate(f"w{index}", random_tokens(index, 3), 4, end=True) for index in range(2)
    ]
    client.generate("late", [1], 4).assert_refused(
        Code.QUEUE_FULL, "2 requests wait for a slot", retryable=True
    )
    assert client.generate("idle0", [1], 2).finish_reason == "length"  # it has a slot
    again = client.generate("w0", [1], 1)  # replaces the waiting generation
    assert waiting[0].finish_reason == "ended"
    client.end("idle1").wait()
    client.end("idle2").wait()
    assert waiting[1].finish_reason == again.finish_reason == "length"


def test_the_queue_of_a_sequence_is_bounded(streams: OpenStreams) -> None:
    client = streams()
    running = client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS).wait_for_tokens(1)
    steps = [client.step("a", [1]) for _ in range(200)]
    full = [
        channel
        for channel in steps
        if (error := channel.wait().error) is not None and error.code is Code.QUEUE_FULL
    ]
    assert full
    assert running.finish_reason == "length"


def test_the_queue_is_bounded_for_start_and_end_without_the_key(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 8)
    with slow_steps(client, 0.01):
        running = client.generate("a", ids, MAX_NEW_TOKENS, sequence_key="mine").wait_for_tokens(1)
        refused = [
            client.step("a", [1], start=True) if number % 2 else client.end("a")
            for number in range(400)
        ]
        running.wait()
    codes = [channel.wait().error.code for channel in refused]  # type: ignore[union-attr]
    assert codes[:127] == [Code.SEQUENCE_KEY] * 127  # queued after the generation
    assert codes[127:] == [Code.QUEUE_FULL] * 273
    assert running.tokens == greedy(repository.llama, ids, MAX_NEW_TOKENS)


@pytest.mark.parametrize(
    ("parameters", "code", "message"),
    [
        (
            {"max_tokens": 0},
            Code.BAD_PARAMETER,
            "parameter 'max_tokens' is 0; expected a whole number of at least 1",
        ),
        ({"max_tokens": "many"}, Code.BAD_PARAMETER, "parameter 'max_tokens' is 'many'"),
        ({"max_tokens": 2.5}, Code.BAD_PARAMETER, "parameter 'max_tokens' is 2.5"),
        ({"stream_interval": 0}, Code.BAD_PARAMETER, "parameter 'stream_interval' is 0"),
        (
            {"ignore_eos": "maybe"},
            Code.BAD_PARAMETER,
            "parameter 'ignore_eos' is 'maybe'; expected true or false",
        ),
        ({"logits": True}, Code.BAD_PARAMETER, "parameter 'logits' belongs to steps"),
        ({"temperature": "hot"}, Code.BAD_PARAMETER, "parameter 'temperature' is 'hot'"),
        ({"position": 5}, Code.POSITION, "meant for position 5, the sequence holds 0"),
        ({"sequence_key": ""}, Code.BAD_PARAMETER, "parameter 'sequence_key' has 0 characters"),
        ({"stop": ("x",)}, Code.BAD_PARAMETER, "without a tokenizer and cannot find stop texts"),
        ({"prompt": "text"}, Code.BAD_PARAMETER, "without a tokenizer: send 'input_ids'"),
        ({"prompt": [VOCABULARY]}, Code.VALUE_RANGE, f"holds {VOCABULARY}"),
    ],
)
def test_an_invalid_generation_is_refused_and_leaves_no_slot(
    streams: OpenStreams, parameters: dict[str, object], code: Code, message: str
) -> None:
    client = streams()
    arguments: dict[str, object] = {"prompt": [1, 2], **parameters}
    client.generate("a", **arguments).assert_refused(code, message)  # type: ignore[arg-type]
    assert client.num_free_slots() == SLOTS


def test_invalid_texts_are_refused(streams: OpenStreams) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))

    def generate(texts: dict[str, tuple[bytes, ...]], inputs: bool = False) -> RecordingChannel:
        ids = {"input_ids": torch.tensor([[1]])} if inputs else {}
        return client.send(Request("a", True, False, ids, parameters={"max_tokens": 1}), texts)

    generate({"text": (b"a", b"b")}).assert_refused(
        Code.BAD_SHAPE, "input 'text' holds 2 texts; expected 1"
    )
    generate({"text": (b"\xff",)}).assert_refused(
        Code.VALUE_RANGE, "input 'text' is not UTF-8 text"
    )
    generate({"text": (b"a",)}, inputs=True).assert_refused(
        Code.BAD_PARAMETER, "are both given; send one of them"
    )
    generate({}).assert_refused(Code.MISSING_INPUT, "input 'input_ids' is missing")
    generate({"text": (b"x" * 64 * CAPACITY + b"x",)}).assert_refused(Code.CAPACITY, "does not fit")
    generate({"text": (b"x",), "stop": (b"",)}).assert_refused(
        Code.VALUE_RANGE, "a text of 0 characters; expected 1 to 256"
    )
    generate({"text": (b"x",), "stop": (b"y",) * 17}).assert_refused(
        Code.BAD_SHAPE, "holds 17 texts; expected at most 16"
    )


def test_a_failed_step_ends_its_generations_and_no_others(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    engine = client.engine
    with slow_steps(client, 0.02):
        channel = client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS).wait_for_tokens(3)
        engine.fail_at = 1
        channel.wait()
    channel.assert_refused(Code.ENGINE_FAILED, "no slot is held, START again", retryable=True)
    assert client.num_free_slots() == SLOTS
    assert client.generate("b", random_tokens(2, 8), 5).wait().tokens == greedy(
        repository.llama, random_tokens(2, 8), 5
    )


def test_a_defect_while_a_request_is_queued_is_an_error_to_its_client(
    streams: OpenStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = streams()
    with monkeypatch.context() as patched:
        patched.setattr("inplace.drivers.senders.CancellationWatcher.add", lambda *_: 1 // 0)
        client.generate("a", [1], 2).assert_refused(
            Code.ENGINE_FAILED, "the backend failed (ZeroDivisionError: "
        )
    assert client.generate("a", [1], 2).finish_reason == "length"


def test_shutdown_answers_running_waiting_and_late_requests(streams: OpenStreams) -> None:
    client = streams()
    with slow_steps(client, 0.02):
        running = [
            client.generate(f"r{index}", random_tokens(index, 8), MAX_NEW_TOKENS)
            for index in range(SLOTS)
        ]
        waiting = [
            client.generate(f"w{index}", random_tokens(index, 8), MAX_NEW_TOKENS)
            for index in range(3)
        ]
        queued = client.step("r0", [1])
        running[0].wait_for_tokens(1)
        client.driver.close()
    numbers = client.metrics()
    assert numbers["inplace_sequences_ended_total", "shutdown"] >= 1
    assert numbers["inplace_sequences_ended_total", "engine_failed"] == 0
    answers = [*running, *waiting, queued]
    for channel in answers:
        channel.wait()
        assert channel.error is None or (
            channel.error.code is Code.SHUTDOWN and channel.error.retryable
        )
    assert sum(channel.error is not None for channel in answers) >= 4
    late = client.generate("late", [1], 1)
    late.assert_refused(Code.SHUTDOWN, retryable=True)


def test_stop_texts_are_found_across_tokens_and_are_not_returned(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    ids = tiny_tokenizer().encode("Licensed work").ids
    expected = greedy(repository.llama, ids, 30)
    text = added(ids, expected)
    at = next(
        at
        for at in range(len(text) // 2, len(text) - 4)
        if text.count(text[at : at + 4]) == 1 and "\ufffd" not in text[at : at + 4]
    )
    channel = client.generate("a", "Licensed work", 30, stop=("never generated", text[at : at + 4]))
    assert channel.finish_reason == "stop"
    assert channel.text == text[: text.index(text[at : at + 4])]
    assert channel.tokens == expected[: len(channel.tokens)]
    assert text[at : at + 4] in added(ids, channel.tokens)
    assert text[at : at + 4] not in added(ids, channel.tokens[:-1])
    more = client.generate("a", "!", 3, start=False, position=len(ids) + len(channel.tokens))
    bang = tiny_tokenizer().encode("!", add_special_tokens=False).ids
    assert more.wait().tokens == greedy(repository.llama, [*ids, *channel.tokens, *bang], 3)
    begun = text[:-1] + "\x00"  # almost reached: the text held back is in the last response
    assert client.generate("b", "Licensed work", 30, stop=(begun[-6:],)).wait().text == text


def test_the_text_is_that_of_the_tokens_for_every_stream_interval(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    ids = tiny_tokenizer().encode("You may").ids
    expected = added(ids, greedy(repository.llama, ids, 40))
    for interval in (1, 3, CHUNK, 40):
        channel = client.generate(f"i{interval}", "You may", 40, stream_interval=interval)
        assert channel.wait().text == expected
    tokens_alone = client.generate(
        "t", "You may", 4, requested_outputs=frozenset({"tokens"})
    ).wait()
    assert all(response.keys() == {"tokens"} for response in tokens_alone.responses)


@pytest.mark.parametrize("last", [True, False])
def test_a_response_that_cannot_be_sent_is_an_error_to_its_client_alone(
    streams: OpenStreams, last: bool
) -> None:
    client = streams()
    failing = FailingChannel(only_final=last)
    request = Request(
        "failing", True, True, {"input_ids": torch.tensor([[1]])}, parameters={"max_tokens": 9}
    )
    client.driver.submit([(request, {}, failing)])
    other = client.generate("other", random_tokens(1, 3), 9, end=True)
    failing.assert_refused(
        Code.ENGINE_FAILED, "a response could not be made (ValueError: too large)"
    )
    assert other.finish_reason == "length"
    wait_until(lambda: client.num_free_slots() == SLOTS)


def test_a_tokenizer_that_fails_ends_its_generation_alone(
    streams: OpenStreams, repository: Repository
) -> None:
    ids = random_tokens(1, 8)
    bad = late_token(greedy(repository.llama, ids, 20))
    client = streams(TokenizerConfig(panicking(bad)))
    tokens_alone = frozenset({"tokens"})
    with slow_steps(client, 0.01):
        other = client.generate("other", ids, 30, end=True, requested_outputs=tokens_alone)
        for number, stop in enumerate([("never",), ()]):
            failing = client.generate(f"a{number}", ids, 30, stop=stop)
            failing.assert_refused(Code.ENGINE_FAILED, "the tokenizer failed on generated tokens")
        wait_until(lambda: client.num_free_slots() == SLOTS - 1)  # all but the other's
    assert other.wait().tokens == greedy(repository.llama, ids, 30)
    client.step("kept", [1], start=True).wait()
    unknown = client.generate("kept", "unknown", 3, start=False, end=True)
    unknown.assert_refused(Code.VALUE_RANGE, "input 'text' has no token ids")
    prompt = client.generate("prompt", [bad], 3)
    prompt.assert_refused(Code.VALUE_RANGE, "the prompt has no text")
    assert client.num_free_slots() == SLOTS


def test_a_generation_whose_client_cannot_be_answered_is_cancelled(streams: OpenStreams) -> None:
    client = streams()
    engine, failing = client.engine, FailingChannel(only_final=False)
    with slow_steps(client, 0.02):
        request = Request(
            "failing",
            True,
            False,
            {"input_ids": torch.tensor([[1]])},
            parameters={"max_tokens": MAX_NEW_TOKENS, "ignore_eos": True},
        )
        client.driver.submit([(request, {}, failing)])
        failing.assert_refused(Code.ENGINE_FAILED)
        wait_until(lambda: client.num_free_slots() == SLOTS)
    assert len(engine.slots) < MAX_NEW_TOKENS / 2
    # Counted after its slot is free.
    wait_until(lambda: client.metrics()["inplace_generations_total", "cancelled"] == 1)


def test_a_stale_end_does_not_end_the_generation_of_the_next_owner(streams: OpenStreams) -> None:
    client = streams()
    with slow_steps(client, 0.02):
        client.generate("x", [1, 2], 4, sequence_key="old").wait()
        step = client.step("x", [3] * 40, sequence_key="old")  # several chunks
        time.sleep(0.05)
        ended = client.end("x", sequence_key="old")
        new = client.generate("x", [7, 8], 5, start=True, sequence_key="new")
        stale = client.end("x", sequence_key="old")  # again, as a retry sends it
        for channel in (step, ended, new, stale):
            channel.wait()
    assert ended.error is None
    assert (new.error, new.finish_reason, len(new.tokens)) == (None, "length", 5)
    assert stale.error is not None and stale.error.code in (
        Code.SEQUENCE_KEY,
        Code.UNKNOWN_SEQUENCE,
    )
