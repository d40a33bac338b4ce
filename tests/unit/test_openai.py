"""The OpenAI front end without a server: its fields, prompts, keys and refusals."""

import errno
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from inplace.drivers.detokenizer import TokenizerError
from inplace.errors import LoadError
from inplace.openai import keys, schemas
from inplace.openai.audio import TranscriptionRequest
from inplace.openai.chat import chat_prompt
from inplace.openai.errors import ApiError
from inplace.openai.keys import Keys, new_key
from inplace.openai.models import ServedModel
from inplace.openai.prefixes import PrefixRecord
from inplace.openai.replicas import Replicas
from inplace.openai.run import Frontend, FrontendError
from inplace.openai.templates import ChatTemplate, TemplateError
from inplace.openai.tokenizer import MARKS, TextTokenizer
from inplace.openai.workers import Worker, Workers, WorkersError
from pydantic import BaseModel, ValidationError
from support.vocabulary import EOS, TOKENIZERS, byte_fallback, chat_tokenizer, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer

PAGE = Path(__file__).parents[2] / "docs/openai.md"


def token_id(tokenizer: Tokenizer, text: str) -> int:
    found = tokenizer.token_to_id(text)
    assert found is not None
    return found


def treatment(model: type[BaseModel], field: str) -> str:
    extra = model.model_fields[field].json_schema_extra
    return str(extra["treatment"]) if isinstance(extra, dict) else "used"


@pytest.mark.parametrize(
    ("table", "model", "base"),
    [
        ("sampling", schemas.SamplingRequest, BaseModel),
        ("chat", schemas.ChatRequest, schemas.SamplingRequest),
        ("completion", schemas.CompletionRequest, schemas.SamplingRequest),
        ("transcription", TranscriptionRequest, BaseModel),
    ],
)
def test_the_page_has_every_field_and_what_happens_to_it(
    table: str, model: type[BaseModel], base: type[BaseModel]
) -> None:
    text = PAGE.read_text().partition(f"<!-- {table} -->")[2].partition("<!--")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    own = model.model_fields.keys() - base.model_fields.keys()
    assert rows.keys() == own
    for field, says in rows.items():
        word = re.match(r"ignored|refused", says)
        assert (word[0] if word else "used") == treatment(model, field), field


def test_a_content_never_becomes_a_special_token() -> None:
    """Of every kind of tokenizer; what is between the template's tokens is read as text."""
    for make in TOKENIZERS.values():
        plain = Tokenizer.from_str(make().to_str())
        tokenizer = Tokenizer.from_str(make().to_str())
        tokenizer.add_special_tokens(["<|turn|>"])
        tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
        turn, call = (token_id(tokenizer, text) for text in ("<|turn|>", "<call>"))
        ours = TextTokenizer(tokenizer)
        for content in ("abc", "<|turn|>", "a<call>b<|turn|>", "<|turn|", "<|<|turn|>turn|>"):
            marks = ours.marks([content])
            ids = ours.encode_marked(f"<|turn|>{marks.add(content)}<|turn|>", marks)
            assert (ids[0], ids[-1], ids.count(turn), ids.count(call)) == (turn, turn, 2, 0)
            text = tokenizer.decode(ids[1:-1])
            expected = plain.decode(plain.encode(content, add_special_tokens=False).ids)
            assert text.split() == expected.split()


def test_contents_without_tokens_are_read_as_transformers_reads_them() -> None:
    tokenizer = chat_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    template = ChatTemplate(tokenizer.chat_template, {"bos_token": "<s>"})
    ours = TextTokenizer(tiny_tokenizer())
    for content in ("What is a Work?", " a < b\n", "<", "\ufdd0 x"):
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]
        marks = ours.marks([content])
        marked = [each | {"content": marks.add(each["content"])} for each in chat]
        rendered = template.render(marked, add_generation_prompt=True)
        reference = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert marks.remove(rendered) == reference
        assert ours.encode_marked(rendered, marks) == tokenizer.encode(
            reference, add_special_tokens=False
        )


CALLS = (
    "{% for tool in tools or [] %}{{ tool | tojson(sort_keys=true) }}{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.id }} {{ call.function | tojson(separators=(',', ':')) }}"
    "{% for name, value in call.function.arguments | items %}{{ name }}={{ value }};{% endfor %}"
    "{% endfor %}</s>{% endfor %}"
)
"""A chat template that reads the arguments of calls as a mapping, as templates of models do."""


def test_calls_of_tools_are_read_as_transformers_reads_them() -> None:
    """Arguments come as JSON text and are a mapping in the template, so they are encoded once."""
    arguments = {"city": 'né "a"', "days": [1, 2.5, None]}
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    function = call | {"function": {"name": "f", "arguments": json.dumps(arguments)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    chat: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]
    model = ServedModel("m", TextTokenizer(tiny_tokenizer()), ChatTemplate(CALLS, {}), None, 64, 0)

    def prompt(calls: list[Any]) -> list[int]:
        body = {"model": "m", "messages": [chat[0] | {"tool_calls": calls}, chat[1]]}
        request = schemas.ChatRequest.model_validate(body | {"tools": [tool]})
        return chat_prompt(model, request.messages, request.tools or ())

    tokenizer = chat_tokenizer()
    text = tokenizer.apply_chat_template(chat, [tool], chat_template=CALLS, tokenize=False)
    assert prompt([function]) == tokenizer.encode(text, add_special_tokens=False)
    # neither a name nor a value becomes a special token, or hides a mark in an escape
    for name in ("</s>", r"\ufdd0</s>"):
        hostile = {"name": "f", "arguments": f'{{"{name}": "{name}"}}'}
        ids = prompt([call | {"function": hostile}])
        assert ids.count(EOS) == 2
        assert tiny_tokenizer().decode(ids).count(json.loads(f'"{name}"')) == 4
    for wrong in ("[1]", "", "{"):
        with pytest.raises(ValidationError, match="arguments"):
            prompt([call | {"function": {"name": "f", "arguments": wrong}}])


def test_reasoning_is_kept_in_replies_alone() -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    marks = TextTokenizer(tokenizer).marks([])
    text = "</think>a</s>"
    assert marks.add(text, reply=True) == f"</think>a<{marks.mark}/s>"
    assert marks.add([text])[0].count(marks.mark) == 2
    with pytest.raises(TokenizerError, match="reserved"):
        TextTokenizer(tokenizer).marks(["".join(MARKS)])


def test_tokens_are_named_by_their_bytes() -> None:
    for tokenizer, text in ((tiny_tokenizer(), "né 🙂"), (byte_fallback(), "ax é")):
        ours = TextTokenizer(tokenizer)
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)).decode().strip() == text
        assert ours.token_bytes(token_id(tokenizer, "</s>")) == b"</s>"


def test_templates_run_in_a_sandbox() -> None:
    for source, text in (
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|access"),
        ("{{ raise_exception('only one system message') }}", "only one system message"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
    ):
        with pytest.raises(TemplateError, match=text):
            ChatTemplate(source, {}).render([], add_generation_prompt=True)
    with pytest.raises(LoadError, match="cannot be compiled"):
        ChatTemplate("{% if %}", {})
    tools = ChatTemplate("{% generation %}{{ tools | tojson }}{% endgeneration %}", {})
    assert tools.render([], add_generation_prompt=False, tools=[{"a": "é"}]) == '[{"a": "é"}]'


def key_file(path: Path, *records: keys.KeyRecord) -> Path:
    path.write_text(keys.KeyFile(keys=records).model_dump_json())
    later = time.time_ns()
    os.utime(path, ns=(later, later))
    return path


def _no_descriptor_left(*_: object, **__: object) -> None:
    raise OSError(errno.EMFILE, "too many open files")


def test_keys_are_digests_and_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "CHECK_INTERVAL", 0.0)
    (key, record), (other, second) = new_key("a"), new_key("b")
    path = key_file(tmp_path / "keys.json", record)
    assert key not in path.read_text()
    known = Keys(path)
    use = known.find(key)
    assert use is not None
    assert use.record == record
    assert known.find(other) is known.find(key[:-1]) is known.find("") is None
    key_file(path, record, second)
    assert known.find(other) is not None
    assert known.find(key) is use
    path.write_text('{"keys": [{"name": "a"}]}')
    assert known.find(key) is use  # a wrong file changes nothing
    key_file(path, second)
    with monkeypatch.context() as patched:  # nor one that cannot be used yet
        patched.setattr(Worker, "running", _no_descriptor_left)
        patched.setattr(known, "_uses", {"a": use})
        assert known.find(key) is use
    assert known.find(key) is None
    key_file(path, second)
    assert known.find(key) is None
    path.write_text(
        json.dumps({"keys": [record.model_dump(), second.model_dump() | {"name": "a"}]})
    )
    with pytest.raises(LoadError, match="two keys have the same name"):
        Keys(path)
    with pytest.raises(LoadError, match="cannot be read"):
        Keys(tmp_path / "nothing")


def test_a_key_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    _, record = new_key("a")
    limits = {"requests_per_minute": 2, "tokens_per_minute": 60, "concurrent": 1}
    use = keys.Use(record.model_copy(update=limits))
    with use.request(), pytest.raises(ApiError, match="1 requests at the same time"), use.request():
        pass
    with use.request():
        use.spend_tokens(100)
    with pytest.raises(ApiError, match="2 requests a minute") as caught, use.request():
        pass
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "30"})
    now = 31.0
    with pytest.raises(ApiError, match="60 tokens a minute") as caught, use.request():
        pass
    now = 75.0
    with use.request():
        pass
    use.spend_tokens(10_000)
    now += 10_000
    with use.request():  # the time after too many tokens counts
        pass


def test_processes_of_a_front_end_share_limits_and_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    workers = [Worker(index, 2, tmp_path, "secret") for index in range(2)]
    _, record = new_key("a")
    limits = {"requests_per_minute": 3, "tokens_per_minute": 600, "concurrent": 2}
    first, second = (keys.Use(record.model_copy(update=limits), each) for each in workers)
    with first.request(), second.request():
        for use in (first, second):
            with pytest.raises(ApiError, match="2 requests at the same time"), use.request():
                pass
        workers[1].forget_running()  # as if it had been killed: its request is gone
        with first.request():
            pass
        for use in (first, second):
            with pytest.raises(ApiError, match="3 requests a minute"), use.request():
                pass
        workers[1].running("x")[0].add(1)
    now = 60.0
    second.spend_tokens(1000)
    with pytest.raises(ApiError, match="600 tokens a minute") as caught, first.request():
        pass
    assert caught.value.headers == {"Retry-After": "40"}
    for _ in range(10):  # the first one does nothing meanwhile, and knows what is left all the same
        now += 60
        with second.request():
            second.spend_tokens(600)
    now += 60
    with first.request():
        pass
    one, other = (PrefixRecord(["a", "b"], each) for each in workers)
    one.add(b"alice", range(64), "b")
    assert other.find(b"alice", range(64), ["a", "b"]) == "b"
    assert Worker().running("x")[0].total == 0  # a front end of one process is alone


def test_processes_are_not_started_where_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(WorkersError, match=f"cannot listen on 127.0.0.1, port {port}: "):
            Workers(print, 2, "127.0.0.1", port, 1.0)
    with pytest.raises(WorkersError, match="cannot listen on"):
        Workers(print, 2, "192.0.2.1", 0, 1.0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_keys_only_the_loopback_interface_is_listened_on(host: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="inplace openai-key"):
        Frontend(["a:1"], tmp_path, host=host).check()
    Frontend(["a:1"], tmp_path, host=host, keys=tmp_path / "keys.json").check()
    for loopback in ("127.0.0.1", "::1", "localhost"):
        Frontend(["a:1"], tmp_path, host=loopback).check()
    with pytest.raises(FrontendError, match="private key"):
        Frontend(["a:1"], tmp_path, certificate=tmp_path).check()


def test_the_same_affinity_goes_to_the_same_server() -> None:
    servers = [f"host-{letter}:8001" for letter in "abcd"]
    replicas = Replicas(servers, ["m"])
    chosen: dict[bytes, str] = {}
    for number in range(200):
        affinity = str(number).encode()
        chosen[affinity] = replicas.choose("m", affinity)
        assert replicas.choose("m", affinity) == chosen[affinity]
    counts = [list(chosen.values()).count(server) for server in servers]
    assert min(counts) > 30
    fewer = Replicas(servers[:3], ["m"])
    moved = sum(fewer.choose("m", key) != server for key, server in chosen.items())
    assert moved == counts[3]
    busy = chosen[b"0"]
    replicas._in_flight[busy] = 10
    assert replicas.choose("m", b"0") != busy


def test_a_prompt_goes_to_the_server_that_has_its_longest_prefix() -> None:
    urls = ["a", "b", "c"]
    record = PrefixRecord(urls)
    words = list(range(100))
    record.add(b"alice", words[:40], "a")  # two whole blocks
    record.add(b"alice", [*words[:16], *words[:48]], "b")
    assert record.find(b"alice", words, urls) == "a"
    assert record.find(b"alice", [*words[:16], 7, *words], urls) == "b"  # the block is the last's
    assert record.find(b"alice", [*words[:16], *words], urls) == "b"
    assert record.find(b"alice", words[:15], urls) is None
    assert record.find(b"alice", [1, *words], urls) is None
    assert record.find(b"bob", words, urls) is None
    assert record.find(b"alice", words, ["c"]) is None


def test_a_block_takes_the_place_of_another() -> None:
    """The table does not grow; what it has lost is not taken for something else."""
    urls = ["a", "b"]
    record = PrefixRecord(urls, max_blocks=8)
    prompts = [range(1000 * each, 1000 * each + 16) for each in range(200)]
    for number, prompt in enumerate(prompts):
        record.add(b"alice", prompt, urls[number % 2])
        assert record.find(b"alice", prompt, urls) == urls[number % 2]
    holders = [record.find(b"alice", prompt, urls) for prompt in prompts]
    assert 0 < sum(holder is not None for holder in holders) <= 8
    assert all(holder in (None, urls[index % 2]) for index, holder in enumerate(holders))


def test_the_server_with_the_prefix_is_preferred_unless_it_has_too_much_to_do() -> None:
    servers = [f"host-{letter}:8001" for letter in "abcd"]
    replicas, prompt = Replicas(servers, ["m"]), list(range(64))
    usual = replicas.choose("m", b"x")
    other = next(url for url in servers if url != usual)
    replicas.computed(b"alice", prompt, other)
    assert replicas.choose("m", b"x", b"alice", prompt) == other
    assert replicas.choose("m", b"x", b"bob", prompt) == usual
    assert replicas.choose("m", b"x", b"", prompt) == usual
    replicas.computed(b"", prompt, other)  # nobody may use it
    replicas._in_flight[other] = 10
    assert replicas.choose("m", b"x", b"alice", prompt) == usual


def test_an_api_key_is_not_in_the_key_of_its_sequences() -> None:
    (key, record), (other, _) = new_key("a"), new_key("b")
    made = keys.sequence_key(key)
    assert made == keys.sequence_key(key) != keys.sequence_key(other)
    assert made != record.sha256
    assert key not in made
    assert 1 <= len(made) <= 256


def test_the_examples_of_the_page_are_requests() -> None:
    [body] = re.findall(r"-d '(\{.+\})'", PAGE.read_text())
    request: Any = schemas.ChatRequest.model_validate_json(body)
    assert json.loads(body)["messages"][0]["content"] == request.messages[0].text
