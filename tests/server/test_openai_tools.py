"""Calls of tools through the front end and a real server, by OpenAI's own client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
from inplace.errors import LoadError
from inplace.openai import Frontend
from inplace.openai.models import load_models
from support.fronts import Front, running
from support.long import long_except
from support.pool import Deployment, ServerPool
from support.served import MODEL
from support.vocabulary import (
    HERMES_TEMPLATE,
    MISTRAL_TEMPLATE,
    tool_tokenizer,
    with_tokenizer,
)
from tokenizers import AddedToken

pytestmark = pytest.mark.server

HERMES, MISTRAL = "hermes_tools", "mistral_tools"
TOKENIZERS = {
    HERMES: tool_tokenizer(
        HERMES_TEMPLATE,
        *(AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")),
    ),
    MISTRAL: tool_tokenizer(
        MISTRAL_TEMPLATE, AddedToken("[TOOL_CALLS]", special=True, normalized=False)
    ),
}
OPENINGS = {HERMES: "<tool_call>", MISTRAL: "[TOOL_CALLS]"}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"unit": {"$ref": "#/$defs/unit"}},
                "required": ["unit"],
                "additionalProperties": False,
                "$defs": {"unit": {"enum": units}},
            },
        },
    }
    for name, units in (("heat", ["C", "F"]), ("speed", ["km/h"]))
]
ASKED: Any = [{"role": "user", "content": "How hot is it?"}]


@pytest.fixture(scope="module")
def repository(stream_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with tokenizers and chat templates that know calls."""
    folder = tmp_path_factory.mktemp("tools")
    for name, tokenizer in TOKENIZERS.items():
        with_tokenizer(stream_models / MODEL, folder / name, tokenizer)
    return folder


@pytest.fixture(scope="module")
def front(repository: Path, pool: ServerPool) -> Iterator[Front]:
    deployments = [Deployment(repository / name) for name in TOKENIZERS]
    with (
        pool.serve(*deployments) as server,
        running(Frontend([server.grpc_url], repository)) as front,
    ):
        yield front


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with front.client() as client:
        yield client


def bias(model: str, value: int) -> dict[str, Any]:
    """Makes a model begin a call wherever it may, or nowhere."""
    [opening] = TOKENIZERS[model].encode(OPENINGS[model], add_special_tokens=False)
    return {"logit_bias": {str(opening): value}}


def check(call: Any) -> None:
    """The arguments of a call are valid for its function."""
    [tool] = [each for each in TOOLS if each["function"]["name"] == call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])


@pytest.mark.parametrize("model", TOKENIZERS)
@pytest.mark.parametrize("choice", [None, "auto", "required", "speed"])
def test_calls_are_valid_and_streamed_in_pieces(
    client: openai.OpenAI, model: str, choice: str | None
) -> None:
    """With ``auto`` the model begins a call by itself: here it likes nothing better."""
    named = {"type": "function", "function": {"name": choice}}
    options: Any = {"model": model, "messages": ASKED, "tools": TOOLS, "temperature": 1.0}
    options |= {"seed": 1, "max_tokens": 180, "parallel_tool_calls": False}
    options |= bias(model, 100)
    if choice is not None:
        options["tool_choice"] = named if choice == "speed" else choice
    answer = client.chat.completions.create(**options).choices[0]
    [call] = answer.message.tool_calls or []
    assert call.type == "function"
    check(call)
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert choice != "speed" or call.function.name == "speed"
    chunks = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)
    ]
    deltas = [each for delta in chunks for each in delta.tool_calls or ()]
    first, *rest = deltas
    assert first.function is not None
    assert (first.index, first.type, first.function.name) == (0, "function", call.function.name)
    assert (first.function.arguments, not first.id) == ("", False)
    assert len(rest) > 1
    assert all((each.index, each.id, each.type) == (0, None, None) for each in rest)
    functions = [each.function for each in rest if each.function is not None]
    assert {each.name for each in functions} == {None}
    assert "".join(each.arguments or "" for each in functions) == call.function.arguments
    assert not any(delta.content for delta in chunks)


@pytest.mark.parametrize("model", long_except(list(TOKENIZERS)[:1], TOKENIZERS))
def test_a_reply_may_have_several_calls(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        temperature=1.0,
        max_tokens=150,
        seed=1,
        n=4,
    )
    counts = set()
    for choice in answer.choices:
        calls: Any = choice.message.tool_calls or []
        counts.add(len(calls))
        for call in calls[:-1] if choice.finish_reason == "length" else calls:
            check(call)
        assert len({call.id for call in calls}) == len(calls)
        assert all(len(call.id) == 9 for call in calls) == (model == MISTRAL)
    assert max(counts) > 1


@pytest.mark.parametrize("model", TOKENIZERS)
def test_text_without_calls_is_what_the_model_says_without_tools(
    client: openai.OpenAI, model: str
) -> None:
    options: Any = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 12}
    options |= {"tools": TOOLS} | bias(model, -100)
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.message.tool_calls is None
    assert answer.finish_reason == "length"
    # a random model writes bytes that are not text; with tools, and here, it does not
    text: Any = {"response_format": {"type": "regex", "regex": "(?s:.)*"}}
    none = client.chat.completions.create(**options, tool_choice="none", extra_body=text)
    if model == MISTRAL:  # whose chat template leaves tools out, so that both have one prompt
        assert answer.message.content == none.choices[0].message.content
    likes_calls = options | bias(model, 100)
    none = client.chat.completions.create(**likes_calls, tool_choice="none")
    assert none.choices[0].message.tool_calls is None


@pytest.mark.parametrize("model", TOKENIZERS)
def test_calls_and_results_go_back_into_the_chat(client: openai.OpenAI, model: str) -> None:
    """As transformers renders them, with the arguments as a mapping."""
    options: Any = {"model": model, "tools": TOOLS, "max_tokens": 180}
    answer = client.chat.completions.create(
        **options, messages=ASKED, tool_choice={"type": "function", "function": {"name": "speed"}}
    )
    message = answer.choices[0].message
    [call] = message.tool_calls or []
    said: Any = message.to_dict()
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "5</tool_call>"}
    again = client.chat.completions.create(
        **(options | {"max_tokens": 1}), messages=[*ASKED, said, result]
    )
    called = said | {"content": ""}
    function = {"name": "speed", "arguments": json.loads(call.function.arguments)}
    called["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
    safe = result | {"content": "5@/tool_call>"}  # as long, and no token
    prompt = TOKENIZERS[model].apply_chat_template(
        [*ASKED, called, safe], TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens == len(prompt)


def test_a_call_that_is_cut_short_has_what_was_written(client: openai.OpenAI) -> None:
    options: Any = {"model": HERMES, "messages": ASKED, "tools": TOOLS, "tool_choice": "required"}
    contents = set()
    for max_tokens in (2, 60):
        answer = client.chat.completions.create(**options, max_tokens=max_tokens, seed=3).choices[0]
        calls: Any = answer.message.tool_calls or []
        contents.add((answer.finish_reason, answer.message.content is None, len(calls) > 0))
    assert ("length", False, False) in contents


def test_the_operator_names_the_format(repository: Path) -> None:
    models: Any = load_models(repository)
    assert {name: model.call_format.name for name, model in models.items()} == {
        HERMES: "hermes",
        MISTRAL: "mistral",
    }
    models = load_models(repository, [f"{MISTRAL}=json", "llama3_json"])
    assert models[MISTRAL].call_format.name == "json"
    assert models[HERMES].call_format.name == "llama3_json"
    for wrong, reason in (("xml", "no format 'xml' of calls"), ("gpt=json", "is for 'gpt'")):
        with pytest.raises(LoadError, match=reason):
            load_models(repository, [wrong])
