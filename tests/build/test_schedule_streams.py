"""A schedule that is served as a stream: its tokens as they come, in several responses."""

import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig, engine_thread
from inplace.drivers.senders import CANCEL_CHECK_INTERVAL
from inplace.errors import Code, LoadError, RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance, open_model
from inplace.schema.served import Manifest
from inplace.server.settings import Settings
from inplace_builder import BuildOptions, write_engine
from support.storing import left_in, memory_bucket, store_in
from support.streaming import RecordingChannel, StreamClient, wait_until
from support.transducing import GreedySearch, chunks
from support.vocabulary import panicking, tiny_tokenizer
from torch import Tensor
from transducer import FEATURES, FRAMES, Decode, Encode, capture, modules

OUTPUTS = frozenset({"tokens", "level", "text_output", "finish_reason"})


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def folder(parts: tuple[Encode, Decode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("streams") / "transducer"
    options = BuildOptions(slots=4, max_rows=4, serve="stream")
    write_engine(capture(*parts), path, options)
    return path / "1"


@pytest.fixture
def instance(folder: Path) -> ScheduledInstance:
    return ScheduledInstance.open(folder)


@pytest.fixture
def client(instance: ScheduledInstance) -> Iterator[StreamClient]:
    driver = StreamDriver(instance, TokenizerConfig(tiny_tokenizer()), 4, engine_thread())
    yield StreamClient(driver)
    driver.close()


def send(
    client: StreamClient, sequence: str, chunk: Tensor, *, start: bool = False, end: bool = False
) -> RecordingChannel:
    request = Request(sequence, start, end, {"features": chunk[None]}, "r")
    return client.send(request, requested_outputs=OUTPUTS)


class Slow:
    """Calls of a program that wait until the test lets them go on."""

    def __init__(self, instance: ScheduledInstance, program: str) -> None:
        self.engine, self.calls, self.allowed = instance.engines[program], 0, 0
        instance.engines = {**instance.engines, program: self}  # type: ignore[dict-item]

    def launch(self, *arguments: Any) -> Any:
        self.calls += 1
        wait_until(lambda: self.calls <= self.allowed)
        return self.engine.launch(*arguments)


def test_tokens_are_sent_as_calls_produce_them(
    client: StreamClient, parts: tuple[Encode, Decode]
) -> None:
    streams = {f"s{number}": chunks(number, 6) for number in range(3)}
    channels = {
        name: [send(client, name, chunk, start=place == 0) for place, chunk in enumerate(stream)]
        for name, stream in streams.items()
    }
    for name, stream in streams.items():
        search, text, tokens = GreedySearch(*parts), "", list[int]()
        for chunk, channel in zip(stream, channels[name], strict=True):
            expected = search.feed(chunk)
            assert channel.finish_reason == "done"
            assert channel.tokens == expected
            *earlier, last = channel.responses
            assert len(earlier) <= len(expected)
            assert all("level" not in response for response in earlier)
            assert last["level"].shape == (1, 16)  # type: ignore[union-attr]
            text, tokens = text + channel.text, tokens + expected
        assert text == tiny_tokenizer().decode(tokens)


def test_a_token_is_sent_before_the_next_call(
    client: StreamClient, instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    slow, [chunk] = Slow(instance, "decode"), chunks(1, 1)
    channel = send(client, "a", chunk, start=True)
    expected = GreedySearch(*parts).feed(chunk)
    while not channel.tokens:
        calls, slow.allowed = slow.calls, slow.allowed + 1
        wait_until(lambda calls=calls: slow.calls > calls or bool(channel.tokens))  # type: ignore[misc]
    sent = list(channel.tokens)
    assert sent == expected[: len(sent)]
    assert len(sent) < len(expected)
    slow.allowed = 100
    assert channel.finish_reason == "done"
    assert channel.tokens == expected


def test_a_client_that_vanishes_in_the_middle_ends_its_sequence(
    client: StreamClient, instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    slow, [chunk] = Slow(instance, "decode"), chunks(1, 1)
    gone, other = (send(client, name, chunk, start=True) for name in ("gone", "other"))
    later = send(client, "gone", chunk)
    wait_until(lambda: slow.calls == 1)
    gone.client_cancelled = later.client_cancelled = True
    time.sleep(5 * CANCEL_CHECK_INTERVAL)  # both are found before the call has ended
    slow.allowed = 100
    assert gone.finish_reason == "cancelled"
    assert later.wait().tokens == []
    assert other.finish_reason == "done"
    assert other.tokens == GreedySearch(*parts).feed(chunk)
    send(client, "gone", chunk).assert_refused(Code.UNKNOWN_SEQUENCE)
    assert len(instance.table) == 1
    counted = client.metrics()
    assert counted["inplace_sequences_ended_total", "cancelled"] == 1


def test_an_end_in_the_middle_waits_for_the_loop(
    client: StreamClient, instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    slow, [chunk] = Slow(instance, "decode"), chunks(1, 1)
    channel = send(client, "a", chunk, start=True)
    wait_until(lambda: slow.calls == 1)
    end = client.end("a")
    slow.allowed = 100
    assert channel.finish_reason == "done"
    assert channel.tokens == GreedySearch(*parts).feed(chunk)
    end.wait()
    assert end.error is None
    assert client.num_free_slots() == 4


@pytest.mark.parametrize("parameter", ["max_tokens", "fetch"])
def test_there_are_no_generations(client: StreamClient, parameter: str) -> None:
    request = Request("a", True, True, {"features": chunks(1, 1)[0][None]}, "r", {parameter: 1})
    client.send(request, requested_outputs=OUTPUTS).assert_refused(
        Code.BAD_PARAMETER, f"not a language model and cannot generate: leave '{parameter}' out"
    )


def test_a_step_has_the_text_of_its_tokens(
    instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    driver, text, tokens = StepDriver(instance, tiny_tokenizer()), "", list[int]()
    try:
        for place, chunk in enumerate(chunks(1, 4)):
            [answer] = driver.run([Request(1, place == 0, False, {"features": chunk[None]})])
            assert isinstance(answer, dict)
            text, tokens = text + answer["text_output"], tokens + answer["tokens"][0].tolist()
    finally:
        driver.close()
    assert len(text) > 4
    assert text == tiny_tokenizer().decode(tokens)


def test_the_text_of_a_copy_goes_on_where_its_sequence_was(
    client: StreamClient, folder: Path
) -> None:
    stream, key = chunks(1, 4), {"sequence_key": "mine"}

    def answers(driver: StepDriver | None) -> list[tuple[str, list[int]]]:
        """Of two chunks, then of two more of the copy before those of the sequence itself."""
        places = [("a", 0), ("a", 1), ("b", 2), ("b", 3), ("a", 2), ("a", 3)]
        result = []
        for name, place in places:
            begins = {"from": "a"} if (name, place) == ("b", 2) else {}
            inputs, start = {"features": stream[place][None]}, place == 0 or bool(begins)
            request = Request(name, start, False, inputs, "r", key | begins)
            if driver is None:
                channel = client.send(request, requested_outputs=OUTPUTS).wait()
                result.append((channel.text, channel.tokens))
            else:
                [answer] = driver.run([request])
                assert isinstance(answer, dict), answer
                result.append((answer["text_output"], answer["tokens"][0].tolist()))
        return result

    steps = StepDriver(ScheduledInstance.open(folder), tiny_tokenizer())
    try:
        for given in (answers(None), answers(steps)):
            assert given[2:4] == given[4:]
            text, tokens = (
                "".join(text for text, _ in given[:4]),
                list(chain(*(each for _, each in given[:4]))),
            )
            assert text == tiny_tokenizer().decode(tokens)
            assert len(given[2][0]) > 0
    finally:
        steps.close()


def test_a_step_whose_text_cannot_be_made_fails_alone(
    instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    first, second = chunks(1, 1)[0], torch.zeros(FRAMES, FEATURES)
    good = GreedySearch(*parts).feed(second)
    bad = next(token for token in GreedySearch(*parts).feed(first) if token not in good)
    driver = StepDriver(instance, panicking(bad))
    try:
        failed, answer = driver.run(
            [
                Request(name, True, False, {"features": each[None]})
                for name, each in (("a", first), ("b", second))
            ]
        )
        assert isinstance(failed, RequestError)
        assert failed.code is Code.ENGINE_FAILED
        assert isinstance(answer, dict)
        assert answer["tokens"][0].tolist() == good
        assert [instance.table.get(name) is None for name in "ab"] == [True, False]
    finally:
        driver.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("encode=2", {"encode": 2}), (" encode=1 , decode=4 ", {"decode": 4})]
)
def test_calls_may_have_fewer_rows(folder: Path, text: str, expected: dict[str, int]) -> None:
    manifest = Manifest.load(folder)
    settings = Settings.parse(served_with(text), manifest)
    assert expected.items() <= settings.call_rows.items()
    instance = open_model(
        folder, manifest, idle_timeout=1, trust=None, call_rows=settings.call_rows, loop_calls=3
    )
    assert isinstance(instance, ScheduledInstance)
    assert instance.loop_calls == 3
    assert instance.max_rows == {"encode": 4, "decode": 4, **settings.call_rows}


@pytest.mark.parametrize("text", ["encode", "encode=0", "encode=5", "other=1", "encode=1,,"])
def test_rows_of_calls_must_fit_the_engine(folder: Path, text: str) -> None:
    with pytest.raises(LoadError, match=r"expected rows by program.*: encode=1…4, decode=1…4"):
        Settings.parse(served_with(text), Manifest.load(folder))


def served_with(call_rows: str) -> str:
    """A configuration as Triton passes it."""
    return json.dumps(
        {
            "max_batch_size": 4,
            "sequence_batching": {"oldest": {}},
            "model_transaction_policy": {"decoupled": True},
            "parameters": {
                "serve": {"string_value": "stream"},
                "call_rows": {"string_value": call_rows},
            },
        }
    )


def test_a_stream_goes_on_in_another_server_with_its_text(
    folder: Path, parts: tuple[Encode, Decode]
) -> None:
    bucket, clients = memory_bucket(), []
    for every in (1, None):
        server = ScheduledInstance.open(folder)
        store_in(server, bucket, every)
        driver = StreamDriver(server, TokenizerConfig(tiny_tokenizer()), 4, engine_thread())
        clients.append(StreamClient(driver))
    first, second = clients
    key: dict[str, Any] = {"sequence_key": "mine"}
    search, stream, text, tokens = GreedySearch(*parts), chunks(5, 8), "", list[int]()

    def feed(client: StreamClient, place: int, **parameters: Any) -> RecordingChannel:
        start = place == 0 or "restore" in parameters
        inputs = {"features": stream[place][None]}
        request = Request("a", start, False, inputs, "r", {**key, **parameters})
        return client.send(request, requested_outputs=OUTPUTS)

    for place in range(8):
        client = first if place < 3 else second
        restore = {"restore": True, "position": place} if place == 3 else {}
        if place == 3:  # between two requests, and before the next one of the first server
            wait_until(lambda: _hands_over(first))
        channel = feed(client, place, **restore)
        expected = search.feed(stream[place])
        assert channel.finish_reason == "done"
        assert channel.tokens == expected
        text, tokens = text + channel.text, tokens + expected
    assert text == tiny_tokenizer().decode(tokens)
    feed(first, 3).assert_refused(Code.SHUTDOWN, "was stored", retryable=True)
    second.end("a", **key).wait()
    for client in clients:
        client.driver.close()
        assert client.driver.instance.snapshots is not None
        client.driver.instance.snapshots.close()
    assert left_in(bucket) == []


def _hands_over(client: StreamClient) -> bool:
    """What the shutdown does again and again; whether it is done."""
    client.driver.hand_over()
    return not len(client.driver.instance.table)
