"""How requests of a stream model end: taken by others, cancelled, refused, failed, shut down; each with exactly one final response."""

import time

import pytest
import torch
from inplace.drivers import TokenizerConfig
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.driving import prompt
from support.models import CAPACITY, CHUNK, SLOTS, VOCABULARY, Repository, greedy
from support.streaming import FREE, Deaf, Heard, OpenStreams, Streams, slowed, until
from support.vocabulary import added, tiny_tokenizer


def full(driver: Streams, slots: int = SLOTS) -> list[Heard]:
    """Sequences that hold every slot, idle."""
    held = [driver.ask(f"held{index}", [5], start=True).wait() for index in range(slots)]
    assert driver.free() == 0
    return held


def test_an_end_without_inputs_ends_a_running_generation(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 8)
    with slowed(driver, 0.02):
        heard = driver.generate("a", ids, FREE).said(3)
        ended = driver.end("a").wait()
    assert (ended.error, ended.responses) == (None, [{}])
    assert heard.reason == "ended"
    assert heard.tokens == greedy(repository.llama, ids, FREE)[: len(heard.tokens)]
    assert len(heard.tokens) < FREE
    assert driver.free() == SLOTS
    driver.end("a").refused(Code.UNKNOWN_SEQUENCE)


def test_an_end_with_tokens_is_the_sequence_s_last_step(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(2, 8)
    with slowed(driver, 0.02):
        heard = driver.generate("a", ids, FREE).said(3)
        last = driver.ask("a", [3, 4], end=True)
        assert heard.reason == "ended"
    assert last.next_token == greedy(repository.llama, [*ids, *heard.tokens, 3, 4], 1)[0]
    assert driver.free() == SLOTS


def test_a_start_takes_the_sequence_from_a_running_generation(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    with slowed(driver, 0.02):
        first = driver.generate("a", prompt(1, 8), FREE).said(2)
        second = driver.generate("a", prompt(2, 9), 5, end=True)
        assert first.reason == "ended"
    assert second.reason == "length"
    assert second.tokens == greedy(repository.llama, prompt(2, 9), 5)


def test_an_end_also_ends_the_generations_that_wait_behind_the_running_one(
    streams: OpenStreams,
) -> None:
    driver = streams()
    with slowed(driver, 0.02):
        heard = [
            driver.generate("a", prompt(1, 8), FREE).said(1),
            *(driver.generate("a", [3], 2, start=False) for _ in range(3)),
        ]
        driver.end("a").wait()
    assert [one.reason for one in heard] == ["ended"] * 4
    assert [len(one.tokens) for one in heard[1:]] == [0, 0, 0]


def test_a_stranger_s_end_and_start_change_nothing(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 8)
    heard = driver.generate("a", ids, FREE, sequence_key="mine").said(2)
    strangers = [
        driver.end("a"),
        driver.end("a", sequence_key="guess"),
        driver.generate("a", [1], 1),
    ]
    assert heard.reason == "length"
    assert heard.tokens == greedy(repository.llama, ids, FREE)
    strangers[0].refused(Code.SEQUENCE_KEY)
    strangers[1].refused(Code.SEQUENCE_KEY)
    strangers[2].refused(Code.SEQUENCE_KEY, retryable=True)
    assert driver.end("a", sequence_key="mine").wait().error is None


def test_the_slot_of_a_cancelled_generation_is_free_within_a_tenth_of_a_second_and_a_step(
    streams: OpenStreams,
) -> None:
    driver, took = streams(), list[float]()
    with slowed(driver, 0.02):
        for _ in range(3):
            heard = driver.generate("a", prompt(1, 8), FREE).said(2)
            heard.gone = True
            took.append(until(lambda: driver.free() == SLOTS))
            assert heard.reason == "cancelled"
    assert min(took) < 0.15  # 0.1 s and a step, where nothing else kept the processor
    driver.ask("a", [1]).refused(Code.UNKNOWN_SEQUENCE)


def test_a_generation_that_waits_can_be_cancelled_and_leaves_the_queue(
    streams: OpenStreams,
) -> None:
    driver = streams()
    full(driver)
    first, second = (
        driver.generate("w1", prompt(1, 3), 2, end=True),
        driver.generate("w2", prompt(2, 3), 2, end=True),
    )
    first.gone = True
    assert first.reason == "cancelled"
    assert first.tokens == []
    driver.end("held0").wait()
    assert second.reason == "length"


def test_generations_get_slots_in_the_order_they_came_and_a_step_does_not_pass_them(
    streams: OpenStreams,
) -> None:
    driver = streams()
    full(driver)
    waiting = [driver.generate(f"w{index}", prompt(index, 3), 4, end=True) for index in range(4)]
    driver.ask("step", [1], start=True).refused(Code.NO_FREE_SLOT, retryable=True)
    with slowed(driver, 0.01):
        driver.end("held0").wait()
        assert [heard.reason for heard in waiting] == ["length"] * 4
    times = [heard.final_at for heard in waiting]
    assert times == sorted(times)
    assert driver.ask("step", [1], start=True).wait().error is None


def test_a_full_queue_refuses_and_a_waiting_sequence_can_be_ended(streams: OpenStreams) -> None:
    driver = streams(max_waiting=2)
    full(driver)
    waiting = [driver.generate(f"w{index}", prompt(index, 3), 4, end=True) for index in range(2)]
    driver.generate("late", [1], 4).refused(
        Code.QUEUE_FULL, "2 generations wait for a slot", retryable=True
    )
    assert driver.generate("held0", [1], 2).reason == "length"  # it has a slot
    again = driver.generate("w0", [1], 1)  # a START takes the place of the one before
    assert waiting[0].reason == "ended"
    driver.end("held1").wait()
    driver.end("held2").wait()
    assert waiting[1].reason == again.reason == "length"


def test_a_sequence_has_no_endless_queue(streams: OpenStreams) -> None:
    driver = streams()
    running = driver.generate("a", prompt(1, 8), FREE).said(1)
    steps = [driver.ask("a", [1]) for _ in range(200)]
    full = [
        heard
        for heard in steps
        if (error := heard.wait().error) is not None and error.code is Code.QUEUE_FULL
    ]
    assert full
    assert running.reason == "length"


def test_nor_has_it_one_for_strangers_who_start_and_end_it(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 8)
    with slowed(driver, 0.01):
        running = driver.generate("a", ids, FREE, sequence_key="mine").said(1)
        strangers = [
            driver.ask("a", [1], start=True) if number % 2 else driver.end("a")
            for number in range(400)
        ]
        running.wait()
    codes = [heard.wait().error.code for heard in strangers]  # type: ignore[union-attr]
    assert codes[:127] == [Code.SEQUENCE_KEY] * 127  # behind the generation itself
    assert codes[127:] == [Code.QUEUE_FULL] * 273
    assert running.tokens == greedy(repository.llama, ids, FREE)


@pytest.mark.parametrize(
    ("parameters", "code", "says"),
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
        ({"stop": ("x",)}, Code.BAD_PARAMETER, "without a tokenizer: and cannot find stop texts"),
        ({"prompt": "text"}, Code.BAD_PARAMETER, "without a tokenizer: send 'input_ids'"),
        ({"prompt": [VOCABULARY]}, Code.VALUE_RANGE, f"holds {VOCABULARY}"),
    ],
)
def test_a_generation_that_cannot_be_is_refused_and_leaves_no_slot(
    streams: OpenStreams, parameters: dict[str, object], code: Code, says: str
) -> None:
    driver = streams()
    arguments: dict[str, object] = {"prompt": [1, 2], **parameters}
    driver.generate("a", **arguments).refused(code, says)  # type: ignore[arg-type]
    assert driver.free() == SLOTS


def test_texts_that_cannot_be_are_refused(streams: OpenStreams) -> None:
    driver = streams(TokenizerConfig(tiny_tokenizer()))

    def generate(texts: dict[str, tuple[bytes, ...]], inputs: bool = False) -> Heard:
        ids = {"input_ids": torch.tensor([[1]])} if inputs else {}
        return driver.send(Request("a", True, False, ids, parameters={"max_tokens": 1}), texts)

    generate({"text": (b"a", b"b")}).refused(
        Code.BAD_SHAPE, "input 'text' holds 2 texts; expected 1"
    )
    generate({"text": (b"\xff",)}).refused(Code.VALUE_RANGE, "input 'text' is not UTF-8 text")
    generate({"text": (b"a",)}, inputs=True).refused(
        Code.BAD_PARAMETER, "are both given; send one of them"
    )
    generate({}).refused(Code.MISSING_INPUT, "input 'input_ids' is missing")
    generate({"text": (b"x" * 64 * CAPACITY + b"x",)}).refused(Code.CAPACITY, "does not fit")
    generate({"text": (b"x",), "stop": (b"",)}).refused(
        Code.VALUE_RANGE, "a text of 0 characters; expected 1 to 256"
    )
    generate({"text": (b"x",), "stop": (b"y",) * 17}).refused(
        Code.BAD_SHAPE, "holds 17 texts; expected at most 16"
    )


def test_a_failed_step_ends_the_generations_in_it_and_no_others(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    engine = driver.engine
    with slowed(driver, 0.02):
        heard = driver.generate("a", prompt(1, 8), FREE).said(3)
        engine.fail_at = 1
        heard.wait()
    heard.refused(Code.ENGINE_FAILED, "no slot is held, START again", retryable=True)
    assert driver.free() == SLOTS
    assert driver.generate("b", prompt(2, 8), 5).wait().tokens == greedy(
        repository.llama, prompt(2, 8), 5
    )


def test_a_defect_while_a_request_is_taken_is_told_to_its_client(
    streams: OpenStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = streams()
    with monkeypatch.context() as patched:
        patched.setattr("inplace.drivers.senders.CancellationWatcher.add", lambda *_: 1 // 0)
        driver.generate("a", [1], 2).refused(
            Code.ENGINE_FAILED, "the backend failed (ZeroDivisionError: "
        )
    assert driver.generate("a", [1], 2).reason == "length"


def test_shutdown_answers_what_runs_waits_and_arrives(streams: OpenStreams) -> None:
    driver = streams()
    with slowed(driver, 0.02):
        held = [driver.generate(f"r{index}", prompt(index, 8), FREE) for index in range(SLOTS)]
        waiting = [driver.generate(f"w{index}", prompt(index, 8), FREE) for index in range(3)]
        behind = driver.ask("r0", [1])
        held[0].said(1)
        driver.driver.close()
    numbers = driver.driver.instance.observer.metrics.snapshot()
    assert numbers["inplace_sequences_ended_total", "shutdown"] >= 1
    assert numbers["inplace_sequences_ended_total", "engine_failed"] == 0
    answers = [*held, *waiting, behind]
    for heard in answers:
        heard.wait()
        assert heard.error is None or (heard.error.code is Code.SHUTDOWN and heard.error.retryable)
    assert sum(heard.error is not None for heard in answers) >= 4
    late = driver.generate("late", [1], 1)
    late.refused(Code.SHUTDOWN, retryable=True)


def test_stop_texts_are_found_across_tokens_and_are_not_said(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams(TokenizerConfig(tiny_tokenizer()))
    ids = tiny_tokenizer().encode("Licensed work").ids
    said = greedy(repository.llama, ids, 30)
    text = added(ids, said)
    at = next(
        at
        for at in range(len(text) // 2, len(text) - 4)
        if text.count(text[at : at + 4]) == 1 and "\ufffd" not in text[at : at + 4]
    )
    heard = driver.generate("a", "Licensed work", 30, stop=("never said", text[at : at + 4]))
    assert heard.reason == "stop"
    assert heard.text == text[: text.index(text[at : at + 4])]
    assert heard.tokens == said[: len(heard.tokens)]
    assert text[at : at + 4] in added(ids, heard.tokens)
    assert text[at : at + 4] not in added(ids, heard.tokens[:-1])
    more = driver.generate("a", "!", 3, start=False, position=len(ids) + len(heard.tokens))
    bang = tiny_tokenizer().encode("!", add_special_tokens=False).ids
    assert more.wait().tokens == greedy(repository.llama, [*ids, *heard.tokens, *bang], 3)
    begun = text[:-1] + "\x00"  # nearly said: what was held back comes with the last response
    assert driver.generate("b", "Licensed work", 30, stop=(begun[-6:],)).wait().text == text


def test_the_text_is_that_of_the_tokens_however_they_are_grouped(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams(TokenizerConfig(tiny_tokenizer()))
    ids = tiny_tokenizer().encode("You may").ids
    expected = added(ids, greedy(repository.llama, ids, 40))
    for interval in (1, 3, CHUNK, 40):
        heard = driver.generate(f"i{interval}", "You may", 40, stream_interval=interval)
        assert heard.wait().text == expected
    tokens_alone = driver.generate("t", "You may", 4, wanted=frozenset({"tokens"})).wait()
    assert all(response.keys() == {"tokens"} for response in tokens_alone.responses)


@pytest.mark.parametrize("last", [True, False])
def test_a_response_that_cannot_be_sent_is_an_error_to_its_client_and_nothing_to_others(
    streams: OpenStreams, last: bool
) -> None:
    driver = streams()
    deaf = Deaf(last=last)
    request = Request(
        "deaf", True, True, {"input_ids": torch.tensor([[1]])}, parameters={"max_tokens": 9}
    )
    driver.driver.submit([(request, {}, deaf)])
    other = driver.generate("other", prompt(1, 3), 9, end=True)
    deaf.refused(Code.ENGINE_FAILED, "a response could not be made (ValueError: too large)")
    assert other.reason == "length"
    until(lambda: driver.free() == SLOTS)


def test_a_generation_whose_client_cannot_be_answered_is_over(streams: OpenStreams) -> None:
    driver = streams()
    engine, deaf = driver.engine, Deaf(last=False)
    with slowed(driver, 0.02):
        request = Request(
            "deaf",
            True,
            False,
            {"input_ids": torch.tensor([[1]])},
            parameters={"max_tokens": FREE, "ignore_eos": True},
        )
        driver.driver.submit([(request, {}, deaf)])
        deaf.refused(Code.ENGINE_FAILED)
        until(lambda: driver.free() == SLOTS)
    assert len(engine.slots) < FREE / 2
    until(
        lambda: (
            driver.driver.instance.observer.metrics.snapshot().get(
                ("inplace_generations_total", "cancelled")
            )
            == 1
        )
    )  # after its slot is free


def test_a_stale_end_leaves_the_next_owner_s_generation(streams: OpenStreams) -> None:
    driven = streams()
    with slowed(driven, 0.02):
        driven.generate("x", [1, 2], 4, sequence_key="old").wait()
        step = driven.ask("x", [3] * 40, sequence_key="old")  # several chunks
        time.sleep(0.05)
        ended = driven.end("x", sequence_key="old")
        new = driven.generate("x", [7, 8], 5, start=True, sequence_key="new")
        stale = driven.end("x", sequence_key="old")  # the END once more, as a retry sends it
        for heard in (step, ended, new, stale):
            heard.wait()
    assert ended.error is None
    assert (new.error, new.reason, len(new.tokens)) == (None, "length", 5)
    assert stale.error is not None and stale.error.code in (
        Code.SEQUENCE_KEY,
        Code.UNKNOWN_SEQUENCE,
    )
