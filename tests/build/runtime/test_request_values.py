"""Requests with any values: each is answered with a result or one of our codes; an END frees."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inplace.drivers import TokenizerConfig
from inplace.drivers.parsing import RequestParser
from inplace.errors import Code, RequestError
from inplace.parameters import BY_NAME
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.long import long_except
from support.models import CAPACITY, SLOTS, VOCABULARY, Repository, greedy, open_instance
from support.streaming import OpenStreams, RecordingChannel
from support.vocabulary import BOS, EOS, tiny_tokenizer

ANY_VALUE = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["9" * 5000, "0", "1", "true", "nan", "\0", "1,2"])
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["max_tokens", "fetch", *BY_NAME, "unheard of"]) | st.text(max_size=8),
    ANY_VALUE,
    max_size=5,
)
TENSORS = st.sampled_from(
    [
        torch.tensor([[1, 2]]),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.tensor([[-1]]),
        torch.tensor([[VOCABULARY]]),
        torch.tensor([[0.5]]),
        torch.tensor(1),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.ones(1, CAPACITY + 1, dtype=torch.int64),
    ]
)
INPUTS = st.dictionaries(st.sampled_from(["input_ids", "value", "slots"]), TENSORS, max_size=2)
TEXTS = st.dictionaries(
    st.sampled_from(["text", "stop"]), st.lists(st.binary(max_size=12), max_size=3).map(tuple)
)
OUTPUTS = st.frozensets(
    st.sampled_from(["tokens", "text_output", "finish_reason", "next_token", "logits", "x"])
)
BAD_PARAMETERS: list[dict[str, Any]] = [
    {"position": "9" * 5000},
    {"position": float("nan")},
    {"position": ""},
    {"temperature": "9" * 5000},
    {"seed": float("inf")},
    {"max_tokens": "9" * 5000},
    {"max_tokens": 3, "stop_token_ids": "9" * 5000},
    {"group": "g" * 5000},
    {"temprature": 1},
    {"min_p": 1.1},
    {"logit_bias": "1:9e9"},
    {"presence_penalty": 1},
    {"fetch": "perhaps"},
    {"fetch": True},
]


@pytest.mark.parametrize("examples", long_except([150], [150, 600]))
def test_any_request_is_parsed_or_refused_with_a_code(
    repository: Repository, examples: int
) -> None:
    instance = open_instance(repository.path / "llama")
    parsers = [
        RequestParser(instance, TokenizerConfig(tokenizer))
        for tokenizer in (tiny_tokenizer(), None)
    ]

    @settings(max_examples=examples)
    @given(
        PARAMETERS, INPUTS, TEXTS, OUTPUTS, st.booleans(), st.booleans(), st.sampled_from(parsers)
    )
    def parse(
        parameters: dict[str, Any],
        inputs: dict[str, torch.Tensor],
        texts: dict[str, tuple[bytes, ...]],
        outputs: frozenset[str],
        start: bool,
        end: bool,
        parser: RequestParser,
    ) -> None:
        request = Request("a", start, end, inputs, parameters=parameters)
        refusal: RequestError | None
        try:
            refusal = parser.parse(request, texts, RecordingChannel(outputs)).validated.refusal
        except RequestError as error:  # raised for an invalid key alone
            refusal = error
        assert refusal is None or (refusal.code in Code and refusal.code is not Code.ENGINE_FAILED)

    parse()


@pytest.mark.parametrize("parameters", BAD_PARAMETERS)
@pytest.mark.parametrize("ids", [[], [3]], ids=["alone", "with-tokens"])
def test_an_end_with_bad_parameters_is_refused_and_frees_its_slot(
    streams: OpenStreams, parameters: dict[str, Any], ids: list[int]
) -> None:
    client = streams()
    assert client.step("a", [5], start=True).wait().error is None
    assert client.num_free_slots() == SLOTS - 1
    refused = client.step("a", ids, end=True, **parameters)
    refused.assert_refused(Code.BAD_PARAMETER)
    assert client.num_free_slots() == SLOTS


def test_an_end_without_tokens_checks_its_position_and_frees_its_slot(
    streams: OpenStreams,
) -> None:
    client = streams()
    for position, code in ((1, None), (7, Code.POSITION)):
        client.step("a", [5], start=True).wait()
        ended = client.end("a", position=position).wait()
        assert (ended.error and ended.error.code) == code
        assert client.num_free_slots() == SLOTS
    client.step("a", [5], start=True).wait()
    client.end("a", sample_rate=16000).assert_refused(Code.BAD_PARAMETER, "it takes no audio")
    assert client.num_free_slots() == SLOTS


def test_an_end_that_cannot_be_read_frees_its_slot(streams: OpenStreams) -> None:
    client = streams()
    unreadable = RequestError(Code.BAD_PARAMETER, "the request cannot be read: x")
    client.step("a", [5], start=True).wait()
    client.send(Request("a", False, True, {}, refusal=unreadable)).assert_refused(
        Code.BAD_PARAMETER, "cannot be read"
    )
    assert client.num_free_slots() == SLOTS
    client.step("b", [5], start=True, sequence_key="mine").wait()
    client.send(Request("b", False, True, {}, refusal=unreadable)).assert_refused(
        Code.BAD_PARAMETER, "cannot be read"
    )
    assert client.num_free_slots() == SLOTS - 1  # its key could not be read


@pytest.mark.parametrize(
    ("outputs", "parameters", "message"),
    [
        ({"tokens", "logits"}, {"max_tokens": 2}, "a generation has no outputs ['logits']"),
        (
            {"next_token"},
            {"max_tokens": 2},
            "it has ['finish_reason', 'reused_tokens', 'text_output",
        ),
        ({"tokens"}, {}, "a step has no outputs ['tokens']; it has ['logits', 'next_token', "),
        (
            {"token_logprobs"},
            {},
            "the outputs ['token_logprobs'] need the parameters ['logprobs']",
        ),
        (
            {"next_token", "token_logprobs", "top_tokens"},
            {"logprobs": 0},
            "the outputs ['top_tokens'] need the parameters ['logprobs'], above 0",
        ),
        (
            {"tokens", "top_logprobs"},
            {"max_tokens": 2, "temperature": 0},
            "the outputs ['top_logprobs'] need the parameters ['logprobs']",
        ),
    ],
)
def test_an_output_that_a_request_does_not_have_is_refused(
    streams: OpenStreams, outputs: set[str], parameters: dict[str, Any], message: str
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    request = Request("a", True, True, {"input_ids": torch.tensor([[1]])}, parameters=parameters)
    channel = client.send(request, requested_outputs=frozenset(outputs))
    channel.assert_refused(Code.BAD_OUTPUT, message)


@pytest.mark.parametrize("outputs", [{"logits"}, {"logits", "next_token"}])
def test_logits_are_returned_where_they_are_requested(
    streams: OpenStreams, outputs: set[str]
) -> None:
    client, names = streams(), frozenset(outputs)
    inputs = {"input_ids": torch.tensor([[1]])}
    [answer] = client.send(Request("a", True, False, inputs), None, names).wait().responses
    assert answer.keys() >= outputs
    request = Request("a", False, True, inputs, parameters={"logits": False})
    [answer] = client.send(request, None, names).wait().responses
    assert "logits" not in answer


@pytest.mark.parametrize(
    ("inputs", "texts", "parameters", "unused"),
    [
        ({"input_ids": [[1]]}, {"stop": (b"x",)}, {}, "stop"),
        ({"input_ids": [[1]], "value": [[1.0]]}, {}, {}, "value"),
        ({"input_ids": [[1]]}, {}, {"fetch": True}, "input_ids"),
    ],
)
def test_an_input_that_a_request_does_not_use_is_refused(
    streams: OpenStreams,
    inputs: dict[str, Any],
    texts: dict[str, tuple[bytes, ...]],
    parameters: dict[str, Any],
    unused: str,
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    tensors = {name: torch.tensor(values) for name, values in inputs.items()}
    channel = client.send(Request("a", False, False, tensors, parameters=parameters), texts)
    channel.assert_refused(Code.BAD_INPUT, f"the inputs ['{unused}'] are not used by this request")


def test_special_tokens_stop_a_generation_also_with_ignore_eos(
    streams: OpenStreams, repository: Repository
) -> None:
    """The third token that is generated is made a special token, so that it can be generated."""
    ids = random_tokens(4, 8)
    expected = greedy(repository.llama, ids, 16)
    number = next(n for n in range(2, 16) if expected.index(expected[n]) == n)
    tokenizer = tiny_tokenizer().from_str(tiny_tokenizer().to_str())
    special = tokenizer.id_to_token(expected[number]) or ""
    tokenizer.add_special_tokens([special])
    config = TokenizerConfig(tokenizer, frozenset({expected[number]}))
    client = streams(config)
    for sequence, (stop, reason, count) in enumerate(
        [((special,), "stop", number + 1), ((), "length", 16)], start=1
    ):
        channel = client.generate(sequence, ids, 16, stop=stop, ignore_eos=True, end=True)
        assert (channel.finish_reason, channel.tokens) == (reason, expected[:count])
    text = tokenizer.decode(ids + expected[:number])[len(tokenizer.decode(ids)) :]
    channel = client.generate("b", ids, 16, stop=(special, "never"), end=True)
    assert (channel.finish_reason, channel.text) == ("stop", text)
    mixed = client.generate("c", ids, 16, stop=(f"{special} x",), end=True)
    mixed.assert_refused(Code.VALUE_RANGE, f"which has the special token {special!r} beside")


def test_stop_token_ids_end_a_generation_and_add_no_text(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    ids = random_tokens(4, 8)
    expected = greedy(repository.llama, ids, 16)
    number = next(n for n in range(2, 16) if expected.index(expected[n]) == n)
    for stop in ((), ("never",)):
        channel = client.generate(
            "a", ids, 16, stop=stop, stop_token_ids=f"{EOS},{expected[number]}", end=True
        )
        assert (channel.finish_reason, channel.tokens) == ("stop", expected[: number + 1])
        whole = tiny_tokenizer().decode(ids + expected[:number])
        assert channel.text == whole[len(tiny_tokenizer().decode(ids)) :]
    outside = client.generate("b", ids, 16, stop_token_ids=VOCABULARY, end=True)
    if client.driver.instance.program.vocab_size:
        outside.assert_refused(Code.BAD_PARAMETER, f"expected token ids below {VOCABULARY}")


def test_a_text_gets_one_beginning_and_special_tokens_as_asked(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams(TokenizerConfig(tiny_tokenizer()))
    plain = tiny_tokenizer().encode("Licensed work", add_special_tokens=False).ids
    for text, add, ids in (
        ("Licensed work", None, [BOS, *plain]),
        ("Licensed work", True, [BOS, *plain]),
        ("Licensed work", "false", plain),
        ("<s>Licensed work", None, [BOS, *plain]),
        ("<s>Licensed work", True, [BOS, *plain]),
        ("<s>Licensed work", False, [BOS, *plain]),
        ("<s><s>Licensed work", False, [BOS, BOS, *plain]),
    ):
        asked: dict[str, Any] = {} if add is None else {"add_special_tokens": add}
        channel = client.generate("a", text, 8, ignore_eos=True, **asked)
        assert channel.finish_reason == "length"
        assert channel.tokens == greedy(repository.llama, ids, 8), (text, add)
        history = [*ids, *channel.tokens]
        more = client.generate(
            "a", "Licensed work", 4, start=False, add_special_tokens=True, end=True
        )
        assert more.wait().tokens == greedy(repository.llama, [*history, BOS, *plain], 4)
    client.generate("a", [1], 2, add_special_tokens=True).assert_refused(
        Code.BAD_PARAMETER, "is for requests with the input 'text'"
    )


def test_a_generation_continues_from_the_last_token_alone(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(4, 8)
    expected = greedy(repository.llama, ids, 15)
    first = client.generate("a", ids, 5)
    assert (first.finish_reason, first.tokens) == ("length", expected[:5])
    more = client.generate("a", [], 6, start=False, position=len(ids) + 5)
    assert (more.finish_reason, more.tokens) == ("length", expected[5:11])
    last = client.generate("a", [], 4, start=False, end=True)
    assert (last.finish_reason, last.tokens) == ("length", expected[11:])
    assert client.num_free_slots() == SLOTS


def test_without_a_last_token_there_is_nothing_to_continue_from(streams: OpenStreams) -> None:
    client = streams()
    client.generate("a", [], 5).assert_refused(Code.EMPTY_INPUT)
    assert client.step("a", [5], start=True).wait().error is None
    client.generate("a", [], 5, start=False).assert_refused(
        Code.EMPTY_INPUT, "no generated token that could be continued from"
    )
    client.generate("b", [], 5, start=False).assert_refused(Code.UNKNOWN_SEQUENCE)
    client.generate("a", [], 5, start=False, end=True).assert_refused(Code.EMPTY_INPUT)
    assert client.num_free_slots() == SLOTS


def test_a_client_with_a_full_queue_does_not_starve_others(
    streams: OpenStreams, repository: Repository
) -> None:
    """It is refused instead of them, and they wait for one of its generations at most."""
    client = streams(max_waiting=16)
    flood = [
        client.generate(f"f{index}", random_tokens(index, 4), 12, end=True, group="flood")
        for index in range(SLOTS + 16)
    ]
    modest = [
        client.generate(f"m{index}", random_tokens(index, 4), 12, end=True, group=f"m{index}")
        for index in range(4)
    ]
    for index, channel in enumerate(modest):
        assert channel.finish_reason == "length"
        assert channel.tokens == greedy(repository.llama, random_tokens(index, 4), 12)
    for channel in flood[-4:]:
        channel.assert_refused(Code.QUEUE_FULL, retryable=True)
    assert all(channel.finish_reason == "length" for channel in flood[:-4])
    order = sorted([*modest, *flood[:-4]], key=lambda channel: channel.final_at)
    assert max(order.index(channel) for channel in modest) < SLOTS + 2 * 4 + SLOTS
    assert client.num_free_slots() == SLOTS
