"""The OpenAI front end over a real server, through OpenAI's own client."""

import base64
import hashlib
import json
import logging
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
import torch
from inplace.errors import LoadError
from inplace.openai import Frontend, Limits
from inplace.openai.keys import KeyFile, new_key
from inplace.openai.models import load_models
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families
from support.dashboards import alerts, selected_metrics, shown_metrics
from support.fronts import Front, running
from support.models import greedy
from support.openai_bodies import REQUESTS, check_answer
from support.served import CAPACITY, MODEL, Served
from support.vocabulary import BOS, EOS, added, chat_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer

pytestmark = pytest.mark.server

CHAT: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You may reproduce copies."},
    {"role": "user", "content": "What is a Derivative Work?"},
]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Not <s> a token, nor %import of a grammar.",
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": units}},
                "required": ["unit"],
                "additionalProperties": False,
            },
        },
    }
    for name, units in (("heat", ["C", "F"]), ("speed", ["km/h"]))
]
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def front(served: Served, stream_models: Path) -> Iterator[Front]:
    limits = Limits(body_bytes=20_000, choices=4, prompts=6, generations=8)
    with running(Frontend([served.server.grpc_url], stream_models, limits=limits)) as front:
        yield front


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with front.client() as client:
        yield client


def chat_ids(messages: Any) -> list[int]:
    """The prompt as transformers makes it."""
    text = chat_tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def logprobs_of(served: Served, ids: list[int]) -> torch.Tensor:
    """The log-probabilities behind each token, by the eager model."""
    with torch.no_grad():
        return torch.log_softmax(served.llama(torch.tensor([ids])).logits[0].double(), -1)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "inplace"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_a_chat_is_answered_as_transformers_answers_it(
    served: Served, client: openai.OpenAI
) -> None:
    ids = chat_ids(CHAT)
    expected = greedy(served.llama, ids, 24)
    assert EOS not in expected
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_completion_tokens=24
    )
    assert answer.choices[0].message.content == added(ids, expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 24)


def test_a_stream_has_the_same_text_and_ends_with_the_usage(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CHAT, "temperature": 0.9, "seed": 3, "n": 2}
    options["max_tokens"] = 20
    whole = client.chat.completions.create(**options)
    texts, reasons = ["", ""], ["", ""]
    usage = None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_prompts_are_texts_or_token_ids_or_lists_of_them(
    served: Served, client: openai.OpenAI
) -> None:
    texts = ["Derivative Works", "the License"]
    ids = [tiny_tokenizer().encode(text).ids for text in texts]
    expected = [added(each, greedy(served.llama, each, 12)) for each in ids]
    prompts: list[Any] = [texts[0], texts, ids[0], ids]
    for prompt, answers in zip(prompts, [expected[:1], expected] * 2, strict=True):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert [choice.text for choice in answer.choices] == answers
        assert [choice.index for choice in answer.choices] == list(range(len(answers)))
    echoed = client.completions.create(
        model=MODEL, prompt=texts, temperature=0, max_tokens=12, echo=True
    )
    assert [choice.text for choice in echoed.choices] == [
        text + more for text, more in zip(texts, expected, strict=True)
    ]


def test_logprobs_are_those_of_the_eager_model(served: Served, client: openai.OpenAI) -> None:
    ids = chat_ids(CHAT)
    expected = greedy(served.llama, ids, 6)
    reference = logprobs_of(served, ids + expected)[len(ids) - 1 : -1]
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    chat = client.chat.completions.create(**options, messages=CHAT, logprobs=True, top_logprobs=3)
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content
    completion = client.completions.create(**options, prompt=ids, logprobs=3)
    legacy = completion.choices[0].logprobs
    assert entries is not None
    assert legacy is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in entries).decode(
        errors="replace"
    ) == added(ids, expected)
    assert [len(token) > 1 for token in legacy.tokens or ()].count(True) > 2
    for token, entry in zip(legacy.tokens or (), entries, strict=True):
        assert token == entry.token or (token.startswith("bytes:") and "\ufffd" in entry.token)
    assert legacy.text_offset is not None
    assert legacy.text_offset[:2] == [0, len(entries[0].token)]
    assert legacy.top_logprobs is not None
    for place, entry in enumerate(entries):
        values, tokens = reference[place].topk(3)
        assert entry.logprob == pytest.approx(float(reference[place][expected[place]]), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )
        assert len(tokens) == len(legacy.top_logprobs[place])
    streamed = [
        entry.logprob
        for chunk in client.chat.completions.create(
            **options, messages=CHAT, logprobs=True, stream=True
        )
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or ()
    ]
    assert streamed == [entry.logprob for entry in entries]


def test_echo_with_logprobs_has_those_of_the_prompt(served: Served, client: openai.OpenAI) -> None:
    """What lm-eval asks for."""
    text = "Derivative Works, né"
    ids = tiny_tokenizer().encode(text).ids
    expected = greedy(served.llama, ids, 1)
    reference = logprobs_of(served, ids)
    options: Any = {"model": MODEL, "prompt": [text, "the"], "echo": True, "logprobs": 2}
    options |= {"max_tokens": 1, "temperature": 0}
    answer = client.completions.create(**options)
    [choice, other] = answer.choices
    assert choice.text == text + added(ids, expected)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert other.logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    first, *values = logprobs.token_logprobs
    assert (first, logprobs.top_logprobs[0]) == (None, None)
    own = reference.gather(1, torch.tensor([*ids[1:], *expected])[:, None])
    assert values == pytest.approx(own.flatten().tolist(), abs=1e-4)
    best = reference.max(-1).values.tolist()
    assert [max(top.values()) for top in logprobs.top_logprobs[1:]] == pytest.approx(best, abs=1e-4)
    for token, offset in zip(logprobs.tokens or (), logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token) or token == "<s>" or "bytes:" in token
    assert logprobs.text_offset[-1] == len(text)
    chunks = list(client.completions.create(**options, stream=True))
    streamed = [
        value
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == 0 and choice.logprobs is not None
        for value in choice.logprobs.token_logprobs or ()
    ]
    assert streamed == logprobs.token_logprobs


def test_options_reach_the_sampler(served: Served, client: openai.OpenAI) -> None:
    ids = tiny_tokenizer().encode("Derivative Works").ids
    plain = greedy(served.llama, ids, 1)[0]
    forced = next(token for token in range(40, 200) if token != plain)

    def first(**options: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt=ids, max_tokens=1, **({"temperature": 0} | options)
        )
        return answer.choices[0].text

    assert first() == added(ids, [plain])
    assert first(logit_bias={str(forced): 100}) == added(ids, [forced])
    assert first(temperature=1.7, extra_body={"top_k": 1}) == first()
    assert first(temperature=1.7, top_p=1e-6) == first()
    assert first(temperature=1.7, seed=5) == first(temperature=1.7, seed=5)
    ended = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=9, temperature=0, logit_bias={str(EOS): 100}
    )
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    kept = client.completions.create(
        model=MODEL,
        prompt=ids,
        max_tokens=9,
        temperature=0,
        logit_bias={str(EOS): 100},
        extra_body={"min_tokens": 4},
    )
    assert kept.usage is not None
    assert kept.usage.completion_tokens == 5


def test_a_reply_follows_its_format(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    options: Any = {"model": MODEL, "messages": CHAT, "temperature": 1.0, "seed": 2, "n": 3}
    answer = client.chat.completions.create(
        **options,
        max_tokens=150,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
        assert choice.finish_reason == "stop"
    for kind, value, matches in (
        ("regex", "[ab]{3}", "[ab]{3}"),
        ("grammar", 'start: "yes" | "no"', "yes|no"),
        ("choice", ["left", "right"], "left|right"),
    ):
        answer = client.chat.completions.create(
            **options, extra_body={"response_format": {"type": kind, kind: value}}
        )
        assert all(re.fullmatch(matches, each.message.content or "") for each in answer.choices)
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            **options,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "array", "uniqueItems": True}},
            },
        )


def test_a_chosen_tool_is_called(client: openai.OpenAI) -> None:
    """Of a model whose chat template knows no tools; tests/server/test_openai_tools.py has more."""
    options: Any = {"model": MODEL, "messages": CHAT, "tools": TOOLS, "temperature": 1.0}
    options |= {"seed": 1, "max_tokens": 200, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "speed"}}
    choices: list[Any] = ["required", named]
    for choice in choices:
        answer = client.chat.completions.create(**options, tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        [tool] = [each for each in TOOLS if each["function"]["name"] == call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), tool["function"]["parameters"])
        assert choice == "required" or call.function.name == "speed"
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
    cut = client.chat.completions.create(**(options | {"max_tokens": 1}), tool_choice="required")
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].message.tool_calls is None
    plain = client.chat.completions.create(**(options | {"max_tokens": 2}), tool_choice="none")
    assert plain.choices[0].message.content


def test_a_stop_text_ends_a_reply(served: Served, client: openai.OpenAI) -> None:
    ids = chat_ids(CHAT)
    text = added(ids, greedy(served.llama, ids, 30))
    stop = next(
        text[at : at + 3]
        for at in range(6, len(text))
        if text.count(text[at : at + 3]) == 1 and "\ufffd" not in text[at : at + 3]
    )
    answer = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=30, stop=["nowhere", stop]
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_special_token_in_a_message_is_text(served: Served, client: openai.OpenAI) -> None:
    content = "a</s>assistant: <s>b"
    as_text = Tokenizer.from_str(tiny_tokenizer().to_str())
    as_text.encode_special_tokens = True
    said, reply = (
        as_text.encode(text, add_special_tokens=False).ids
        for text in (f"user: {content}", "assistant: ")
    )
    ids = [BOS, *said, EOS, *reply]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
    )
    assert answer.choices[0].message.content == added(ids, greedy(served.llama, ids, 8))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert chat_ids([{"role": "user", "content": content}]).count(EOS) == 2


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"temprature": 1}, "temprature", "not one that this server knows"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": 10**6}, None, "size of the vocabulary"),
        ({"n": 5}, "n", "at most 4"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, None, "logprobs=true"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"functions": []}, "functions", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": TOOLS}, "tool_choice", "not known in which format"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "has the fields"),
        ({"response_format": {"type": "regex", "regex": "("}}, None, "regex"),
        ({"stream_options": {}}, None, "stream=true"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0", "needs a content"),
        ({"stop": ["a"] * 17}, None, "16"),
        ({"seed": 2**64}, "seed", "2^63"),
    ],
)
def test_a_wrong_field_is_named(
    front: Front, body: dict[str, Any], param: str | None, text: str
) -> None:
    """With and without a stream: the first event is waited for before the status is sent."""
    for stream in (False, True):
        if stream and "stream_options" in body:
            continue
        status, answer = front.post(
            "/v1/chat/completions", **{"model": MODEL, "messages": CHAT, "stream": stream} | body
        )
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert text in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"


def test_errors_have_the_types_of_openais_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=CHAT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * (CAPACITY + 1))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="at most 6"):
        client.completions.create(model=MODEL, prompt=["a"] * 7)
    with pytest.raises(openai.BadRequestError, match="at most 8"):
        client.completions.create(model=MODEL, prompt=["a"] * 5, n=2)


def test_what_is_no_request_is_refused(front: Front) -> None:
    path = "/v1/completions"
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    assert front.send(path, body)[0] == 200
    cases = [
        (front.send(path, body, Content_Type="text/plain"), 415, "application/json"),
        (front.send(path, body, Content_Encoding="gzip"), 415, "compressed"),
        (front.send(path, body, Host="evil.example"), 421, "does not name this server"),
        (front.send(path, body + b" " * 20_000), 413, "more than 20000 bytes"),
        (front.send(path, b'{"model": NaN}'), 400, "valid string"),
        (front.send(path, b"[" * 10_000), 400, "recursion limit"),
        (front.send(path, b'{"prompt": "\\ud800"}'), 400, "hex escape"),
        (front.send(path), 405, "does not take GET"),
        (front.send("/v1/responses", body), 404, "there is no /v1/responses"),
    ]
    for (status, headers, answer), expected, text in cases:
        assert status == expected
        assert text in answer["error"]["message"]
        assert headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(front: Front, stream: bool) -> None:
    before = front.metric("inplace_openai_requests_in_flight")
    generated = front.metric("inplace_openai_generated_tokens_total")
    body = json.dumps({"model": MODEL, "messages": CHAT, "n": 4, "stream": stream, **LONG}).encode()
    with socket.create_connection(("127.0.0.1", front.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        if stream:
            assert connection.recv(16)
        else:
            front.wait_for("inplace_openai_requests_in_flight", before + 1)
    front.wait_for("inplace_openai_requests_in_flight", before)
    assert front.metric("inplace_openai_generated_tokens_total") - generated < 4 * 200


def test_a_model_that_cannot_be_read_is_left_out(
    stream_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton serves the others too."""
    shutil.copytree(stream_models / MODEL, tmp_path / MODEL)
    (tmp_path / "broken/1").mkdir(parents=True)
    (tmp_path / "broken/config.pbtxt").write_text('parameters { key: "serve" }')
    (tmp_path / "broken/1/engine.json").write_text("{}")
    assert list(load_models(tmp_path)) == [MODEL]
    assert "broken is not offered: " in caplog.text
    shutil.rmtree(tmp_path / MODEL)
    with pytest.raises(LoadError, match="has no language or speech model that can be read"):
        load_models(tmp_path)


def test_health_and_metrics(front: Front) -> None:
    assert front.send("/health")[::2] == (200, {"ready": True})
    status, headers, text = front.send("/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    assert 'inplace_openai_requests_total{route="/health",status="200"}' in text
    assert "inplace_openai_first_token_seconds_bucket" in text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    served = {each.name for each in samples if each.name.startswith("inplace_openai_")}
    assert shown_metrics("openai") == served
    expressions = alerts("inplace-openai")
    assert all(selected_metrics(expression) <= served for expression in expressions)
    labels = {label for each in samples for label in each.labels}
    assert {label for each in expressions for label in re.findall(r"(\w+)!?=", each)} <= labels


@hypothesis.given(REQUESTS)
def test_every_body_is_answered_with_a_result_or_an_error(
    front: Front, request: tuple[str, bytes]
) -> None:
    """tests/long sends ten thousand."""
    check_answer(front, *request)


def test_keys_and_their_limits(served: Served, stream_models: Path, tmp_path: Path) -> None:
    (key, record), (other, second) = new_key("a"), new_key("b")
    records = (
        record.model_copy(update={"requests_per_minute": 2}),
        second.model_copy(update={"metrics": True}),
    )
    file = tmp_path / "keys.json"
    file.write_text(KeyFile(keys=records).model_dump_json())
    log = tmp_path / "log"
    handler = logging.FileHandler(log)
    logging.getLogger().addHandler(handler)
    options: Any = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    with (
        running(Frontend([served.server.grpc_url], stream_models, keys=file)) as front,
        front.client(key) as client,
    ):
        for _ in range(2):
            client.completions.create(**options)
        with pytest.raises(openai.RateLimitError, match="2 requests a minute") as caught:
            client.completions.create(**options)
        assert int(caught.value.response.headers["retry-after"]) > 1
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.with_options(api_key=key[:-1]).completions.create(**options)
        client.with_options(api_key=other).completions.create(**options)
        assert front.send("/v1/models")[0] == 401
        assert front.send("/health")[0] == 200
        assert front.send("/metrics", Authorization=f"Bearer {key}")[0] == 403
        status, _, text = front.send("/metrics", Authorization=f"Bearer {other}")
        assert status == 200
    logging.getLogger().removeHandler(handler)
    handler.close()
    written = log.read_text() + text
    assert "POST /v1/completions 200" in written
    assert not any(secret in written for secret in (key, other, record.sha256))


def test_the_chat_page_runs_nothing_but_its_own_script(front: Front) -> None:
    status, headers, page = front.send("/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)
    assert not re.search(r"https?://|<link|<img|<iframe| on\w+=", page)
    assert front.send("/", Host="evil.example")[0] == 421
