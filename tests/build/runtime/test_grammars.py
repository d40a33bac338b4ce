"""Generations that follow a grammar: what they end with, and what the driver does meanwhile."""

import json
import random
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from inplace.drivers import TokenizerConfig
from inplace.errors import Code
from support.schemas import random_schema
from support.streaming import OpenStreams, RecordingChannel, StreamClient
from support.vocabulary import tiny_tokenizer

EOS = 2
CONFIG = TokenizerConfig(tiny_tokenizer(), frozenset({EOS}))
PROMPT, MOST = [5, 6], 58
REASONS = ("grammar", "engine_failed")


def generate(client: StreamClient, name: str, most: int = MOST, **given: Any) -> RecordingChannel:
    return client.generate(name, PROMPT, most, **{"temperature": 1.0, "end": True, **given})


def end(channel: RecordingChannel) -> tuple[str, str]:
    return channel.finish_reason, channel.text


def test_generations_end_where_their_grammar_does(streams: OpenStreams) -> None:
    client = streams(CONFIG)
    only_a = {"allowed_token_ids": tiny_tokenizer().token_to_id("a")}
    given: list[tuple[dict[str, Any], str, set[str]]] = [
        ({"regex": "a{5}"}, "stop", {"aaaaa"}),
        ({"regex": "a{5}", "most": 5, **only_a}, "stop", {"aaaaa"}),
        ({"regex": "a{9}", "most": 5, **only_a}, "length", {"aaaaa"}),
        ({"regex": "(red|green)x", "stop": ("re",)}, "stop", {"", "g"}),
        ({"regex": "a?", "min_tokens": 3}, "stop", {"a"}),
        ({"choice": '["yes"]', "ignore_eos": True}, "stop", {"yes"}),
        ({"json_object": True, "temperature": 0.0, "most": 1}, "length", {"{"}),
    ]
    channels = [generate(client, f"{index}", **each) for index, (each, *_) in enumerate(given)]
    for channel, (each, reason, texts) in zip(channels, given, strict=True):
        assert channel.finish_reason == reason, each
        assert channel.text in texts, each


def test_a_generation_that_has_no_token_left_is_an_error(streams: OpenStreams) -> None:
    client, tokenizer = streams(CONFIG), tiny_tokenizer()
    banned = ",".join(str(tokenizer.token_to_id(letter)) for letter in "ab")
    free = client.num_free_slots()
    refused = generate(client, "a", regex="a|b", banned_token_ids=banned)
    refused.assert_refused(Code.BAD_PARAMETER, "no token is left that may be chosen")
    assert client.num_free_slots() == free
    ended = {
        reason: client.metrics()["inplace_sequences_ended_total", reason] for reason in REASONS
    }
    assert ended == {"grammar": 1, "engine_failed": 0}


def test_random_schemas_end_and_are_valid(streams: OpenStreams) -> None:
    client, generator = streams(CONFIG), random.Random(4)
    schemas = [random_schema(generator, depth=0) for _ in range(20)]
    channels = [
        generate(client, f"s{index}", json=json.dumps(schema), seed=index)
        for index, schema in enumerate(schemas)
    ]
    for channel, schema in zip(channels, schemas, strict=True):
        assert channel.finish_reason in ("stop", "eos"), schema
        jsonschema.validate(json.loads(channel.text), schema)


def test_others_get_the_tokens_that_they_get_alone(streams: OpenStreams) -> None:
    client = streams(CONFIG)
    plain: dict[str, Any] = {"seed": 7, "ignore_eos": True}
    alone = generate(client, "alone", **plain).wait().tokens
    steps = len(client.engine.slots)
    regex = "[a-f]{30}"
    follower = generate(client, "follower", regex=regex, seed=1).wait()
    assert re.fullmatch(regex, follower.text)
    together = [generate(client, f"p{index}", **plain) for index in range(2)]
    followers = [generate(client, f"g{index}", regex=regex, seed=1) for index in range(2)]
    assert [each.wait().tokens for each in together] == [alone] * 2
    assert [each.wait().tokens for each in followers] == [follower.tokens] * 2
    assert steps == MOST


def test_a_grammar_that_is_too_expensive_is_refused_while_others_are_served(
    streams: OpenStreams,
) -> None:
    client = streams(CONFIG)
    properties = {f"p{index}": {"type": "string"} for index in range(1500)}
    large = json.dumps({"type": "object", "properties": properties})
    expensive = generate(client, "expensive", json=large)
    others = [generate(client, f"o{index}", most=5) for index in range(20)]
    for other in others:
        assert len(other.wait().tokens) >= 1
    expensive.assert_refused(Code.BAD_PARAMETER, "the grammar")
    assert generate(client, "expensive", regex="ok").wait().text == "ok"


def test_a_cancelled_generation_frees_its_slot_while_its_grammar_is_compiled(
    streams: OpenStreams,
) -> None:
    client = streams(CONFIG)
    free = client.num_free_slots()
    channel = generate(client, "gone", regex="(ab){9}", most=MOST)
    channel.client_cancelled = True
    channel.wait()
    assert generate(client, "next", choice='["ok"]').wait().text == "ok"
    assert client.num_free_slots() == free


def test_generated_tokens_of_the_prompt_are_the_beginning_of_the_text(
    streams: OpenStreams,
) -> None:
    client = streams(CONFIG)
    [first] = tiny_tokenizer().encode("a", add_special_tokens=False).ids
    given: dict[str, Any] = {"temperature": 1.0, "end": True, "num_generated": 1}
    follower = client.generate("g", [*PROMPT, first], MOST, regex="a(bc){2}", **given)
    assert end(follower) == ("stop", "bcbc")
    wrong = client.generate("w", [*PROMPT, first], MOST, regex="b+", **given)
    wrong.assert_refused(Code.BAD_PARAMETER, "cannot be followed any further")
    many = client.generate("m", PROMPT, MOST, regex="a+", num_generated=40000)
    many.assert_refused(Code.BAD_PARAMETER, "expected at most 32768 with a grammar")


@pytest.mark.parametrize("streams", [False], indirect=True)
def test_models_without_a_tokenizer_refuse_grammars(streams: OpenStreams) -> None:
    client = streams(TokenizerConfig(eos_token_ids=frozenset({EOS})))
    client.generate("a", PROMPT, 5, regex="a").assert_refused(
        Code.BAD_PARAMETER, "was built without a tokenizer and cannot follow a grammar"
    )
