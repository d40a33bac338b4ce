"""Chats through the front end whose history is sent whole in each turn, and computed once."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from inplace.openai import Frontend
from inplace.openai.keys import KeyFile, new_key
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.fronts import Front, running
from support.observed import Observed
from support.pool import Deployment, ServerPool
from support.served import MODEL, Served
from support.streams import prompt as random_prompt
from support.vocabulary import tiny_tokenizer
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

REUSING = "reusing_chats"
PREFILL = ("inplace_tokens_total", "prefill")
REUSED = ("inplace_prefix_tokens_total", "")


def turned_on(config: pb.ModelConfig) -> None:
    for name in ("prefix_reuse", "prefix_reuse_without_key"):
        config.parameters[name].string_value = "on"


@pytest.fixture(scope="module")
def observed(served: Served, stream_models: Path, pool: ServerPool) -> Iterator[Observed]:
    """The server with a model that reuses prefixes, and `MODEL`, which does not."""
    with (
        pool.serve(Deployment(stream_models / MODEL, REUSING, turned_on)) as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        yield Observed(server, client, pool.repository)


KEYS = {name: new_key(name) for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(KeyFile(keys=tuple(record for _, record in KEYS.values())).model_dump_json())
    return file


@pytest.fixture(scope="module")
def front(observed: Observed, key_file: Path) -> Iterator[Front]:
    frontend = Frontend([observed.server.grpc_url], observed.repository, keys=key_file)
    with running(frontend) as front:
        yield front


@pytest.fixture
def alice(front: Front) -> Iterator[openai.OpenAI]:
    with front.client(KEYS["alice"][0]) as client:
        yield client


@pytest.fixture
def bob(front: Front) -> Iterator[openai.OpenAI]:
    with front.client(KEYS["bob"][0]) as client:
        yield client


def saying(text: str) -> dict[str, Any]:
    """Lets a model say a token again and again, which the next turn reads as the same tokens."""
    [token] = tiny_tokenizer().encode(text, add_special_tokens=False).ids
    return {"logit_bias": {str(token): 100}, "max_tokens": 4}


def chat(
    client: openai.OpenAI, model: str, turns: int, begin: str, **options: Any
) -> tuple[list[str], list[int], list[int]]:
    """The replies of a chat, the tokens of each turn's prompt, and how many were cached."""
    history: list[Any] = [{"role": "system", "content": begin}]
    replies, prompts, cached = [], [], []
    for turn in range(turns):
        history.append({"role": "user", "content": f"{turn}"})
        answer = client.chat.completions.create(
            model=model, messages=history, temperature=0, **saying("~"), **options
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        replies.append(answer.choices[0].message.content or "")
        prompts.append(answer.usage.prompt_tokens)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        history.append({"role": "assistant", "content": replies[-1]})
    return replies, prompts, cached


def test_ten_turns_of_a_chat_compute_each_token_once(
    observed: Observed, alice: openai.OpenAI
) -> None:
    before = {model: observed.numbers(model) for model in (MODEL, REUSING)}
    replies, prompts, none = chat(alice, MODEL, 10, "Alice")
    # the last token of a reply was not fed; a turn computes it, and what is behind it
    cached = [0, *(length + 3 for length in prompts[:-1])]
    assert chat(alice, REUSING, 10, "Alice") == (replies, prompts, cached)
    assert not any(none)
    assert sum(prompts) > 5 * (sum(prompts) - sum(cached))
    for model, reused in ((MODEL, 0), (REUSING, sum(cached))):
        added = {PREFILL: sum(prompts) - reused, REUSED: reused}
        expected = {name: before[model][name] + value for name, value in added.items()}
        numbers = observed.settled(model, expected)
        assert {name: numbers[name] for name in expected} == expected


def test_two_keys_and_two_salts_share_nothing(alice: openai.OpenAI, bob: openai.OpenAI) -> None:
    begin = "The same words, of more than one block of tokens"
    replies, _, cached = chat(alice, REUSING, 2, begin)
    assert cached[0] == 0
    assert cached[1] > 16
    for client, options in (
        (bob, {}),
        (alice, {"extra_body": {"cache_salt": "another user"}}),
        (bob, {"extra_body": {"cache_salt": "another user"}}),
    ):
        assert chat(client, REUSING, 2, begin, **options) == (replies, _, cached)
    again, _, found = chat(alice, REUSING, 1, begin)
    assert again == replies[:1]
    assert found[0] > 16


def test_usage_of_a_stream_and_metrics_have_cached_tokens(
    front: Front, alice: openai.OpenAI
) -> None:
    prompt = tiny_tokenizer().encode("A prompt that is streamed twice, in all its length").ids
    options: Any = {"model": REUSING, "prompt": prompt, "max_tokens": 2, "stream": True}
    details = []
    for _ in range(2):
        *_, last = alice.completions.create(**options, stream_options={"include_usage": True})
        assert last.usage is not None
        assert last.usage.prompt_tokens_details is not None
        details.append(last.usage.prompt_tokens_details.cached_tokens)
    assert details == [0, len(prompt) - 1]


def test_without_api_keys_clients_share_where_the_operator_says_so(observed: Observed) -> None:
    frontend = Frontend([observed.server.grpc_url], observed.repository)
    with running(frontend) as front, front.client() as client:
        *_, cached = chat(client, REUSING, 2, "No key")
        assert cached[1] > 0
        assert front.metric("inplace_openai_cached_tokens_total") == sum(cached)
        body = {"model": REUSING, "prompt": "a", "cache_salt": ""}
        status, _, answer = front.send("/v1/completions", json.dumps(body).encode())
        assert (status, "cache_salt" in answer["error"]["message"]) == (400, True)


CHOICES = 4
LONG: Any = {"temperature": 0.9, "max_tokens": 6, "extra_body": {"ignore_eos": True}}


def texts(client: openai.OpenAI, model: str, prompt: list[int], seed: int, n: int) -> list[str]:
    answer = client.completions.create(model=model, prompt=prompt, seed=seed, n=n, **LONG)
    return [choice.text for choice in answer.choices]


def test_choices_compute_their_prompt_once(observed: Observed, alice: openai.OpenAI) -> None:
    """With the tokens that each has alone, with its own seed."""
    prompt = random_prompt(11, 100)
    before = observed.numbers(MODEL)[PREFILL]
    alone = [texts(alice, MODEL, prompt, 5 + index, 1)[0] for index in range(CHOICES)]
    assert len(set(alone)) == CHOICES
    assert texts(alice, MODEL, prompt, 5, CHOICES) == alone
    # the last token of the prompt is a step of each choice, as one that was generated
    computed = before + CHOICES * len(prompt) + len(prompt) - 1
    assert observed.settled(MODEL, {PREFILL: computed})[PREFILL] == computed
    for cached in (0, len(prompt) - 2):
        answer = alice.completions.create(
            model=REUSING, prompt=prompt, seed=5, n=CHOICES, stream=False, **LONG
        )
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_choices_that_wait_for_slots_do_not_wait_for_each_other(alice: openai.OpenAI) -> None:
    """Each of these requests holds a slot and needs three more: there are eight."""
    prompts = [random_prompt(20 + number, 70) for number in range(8)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = [
            threads.submit(texts, alice, MODEL, prompt, number, CHOICES)
            for number, prompt in enumerate(prompts)
        ]
        found = [each.result(timeout=60) for each in together]
    for number, prompt in enumerate(prompts[:2]):
        alone = [texts(alice, MODEL, prompt, number + index, 1)[0] for index in range(CHOICES)]
        assert found[number] == alone


@pytest.mark.long
def test_a_chat_stays_with_the_server_that_has_its_prefix(
    observed: Observed, stream_models: Path, key_file: Path, tmp_path: Path
) -> None:
    """Two servers: chats begin on both, and each turn goes where the turn before was."""
    Deployment(stream_models / MODEL, REUSING, turned_on).copy_to(tmp_path / "models")
    with (
        TritonServer(tmp_path / "models", Ports(0, 0, 0), log=tmp_path / "log") as second,
        InferenceServerClient(second.grpc_url) as connection,
    ):
        both = [observed, Observed(second, connection, tmp_path / "models")]
        urls = [each.server.grpc_url for each in both]
        started = [each.numbers(REUSING)[PREFILL] for each in both]
        frontend = Frontend(urls, tmp_path / "models", keys=key_file)
        with running(frontend) as front, front.client(KEYS["alice"][0]) as client:
            for number in range(8):
                _, prompts, cached = chat(client, REUSING, 4, f"Chat {number * 7919}")
                assert cached[1:] == [length + 3 for length in prompts[:-1]]
        ends = [each.settled(REUSING, {PREFILL: -1.0})[PREFILL] for each in both]  # after 10 s
        assert all(end > start for start, end in zip(started, ends, strict=True))
