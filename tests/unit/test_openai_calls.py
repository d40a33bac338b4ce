"""Calls of tools without a server: the reader at every cut, grammars, formats of templates."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inplace.grammars import GrammarCompiler, GrammarSource
from inplace.openai.call_reader import Arguments, CallBegin, CallReader, Content, Event
from inplace.openai.calls import (
    FORMATS,
    HERMES,
    JSON,
    LLAMA3_JSON,
    MISTRAL,
    CallFormat,
    CallGrammar,
    Function,
    format_of_template,
)
from inplace.openai.errors import ApiError
from inplace.openai.models import ServedModel
from inplace.openai.schemas import ChatRequest
from inplace.openai.structure import structure_of
from inplace.openai.templates import ChatTemplate
from inplace.openai.tokenizer import TextTokenizer
from support.matching import EOS, follow
from support.vocabulary import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer

NAMES = ("heat", "heat-2", "speed")
UNITS: dict[str, Any] = {
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/unit"}},
    "required": ["unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "%json {", 'a "}{" b']}},
}
FUNCTIONS = [Function(name, UNITS) for name in NAMES]


def read(format: CallFormat, pieces: Sequence[str]) -> list[Event]:
    """What a reader returns; neighbours of one kind are joined."""
    reader, events = CallReader(format, NAMES), list[Event]()
    for piece in pieces:
        events += reader.append(piece)
    events += reader.flush()
    joined: list[Event] = []
    for kind, group in groupby(events, type):
        if kind is CallBegin:
            joined += group
        else:
            texts = "".join(each.text for each in group if not isinstance(each, CallBegin))
            joined.append(Content(texts) if kind is Content else Arguments(texts))
    return joined


def cut(text: str, places: set[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[begin:end] for begin, end in pairwise(ends)]


def written(format: CallFormat, calls: Sequence[tuple[str, str]], space: str = "") -> str:
    """Calls as a model writes them."""
    objects = [
        f'{{"name":{space}"{name}",{space}"{format.arguments}":{space}{arguments}{space}}}'
        for name, arguments in calls
    ]
    if format is HERMES:
        return space.join(f"<tool_call>{space}{each}{space}</tool_call>" for each in objects)
    joined = f"{format.separator}{space}".join(objects)
    return f"[TOOL_CALLS]{space}[{joined}]" if format is MISTRAL else joined


ARGUMENTS = st.dictionaries(
    st.text(max_size=3),
    st.text(max_size=5) | st.sampled_from(['"}', "\\", "</tool_call>", "[]"]) | st.lists(st.none()),
    max_size=3,
).map(json.dumps)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
SPACE = st.sampled_from(["", " ", "\n  "])
WORDS = st.text(st.characters(exclude_characters="<[{|; \t\r\n"), min_size=1, max_size=6)


@given(st.sampled_from([*FORMATS.values()]), CALLS, SPACE, WORDS, WORDS, st.sets(st.integers(0)))
def test_calls_are_read_whatever_the_pieces_are(
    format: CallFormat,
    calls: list[tuple[str, str]],
    space: str,
    before: str,
    behind: str,
    places: set[int],
) -> None:
    expected: list[Event] = [
        event for name, text in calls for event in (CallBegin(name), Arguments(text))
    ]
    text = written(format, calls, space)
    if format.needs_opening:
        text = f"{before}{space}{text}{space}{behind}"
        expected = [Content(before), *expected, Content(space + behind)]
    assert read(format, cut(text, places)) == expected
    assert read(format, list(text)) == expected


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[", "]", ";", ",", "}"),
            *("<|python_tag|>", " ", "\n", "a", '{"name": "heat", ', '"arguments": {', "{"),
            *('{"name": "heat", "arguments": {"a": "}"}}', '{"name": "x', '"parameters": {}}'),
        ]
    ),
    max_size=9,
).map("".join)


@given(st.sampled_from([*FORMATS.values()]), FRAGMENTS, st.sets(st.integers(0)))
def test_a_text_of_any_kind_is_read_the_same_at_every_cut(
    format: CallFormat, text: str, places: set[int]
) -> None:
    events = read(format, [text])
    assert read(format, cut(text, places)) == events
    assert read(format, list(text)) == events
    position = 0  # what is returned is in the text, in this order
    for event in events:
        if not isinstance(event, CallBegin):
            assert event.text
            position = text.index(event.text, position) + len(event.text)
    if not any(isinstance(event, CallBegin) for event in events):
        assert events == ([Content(text)] if text else [])


WHOLE = "the whole text"


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        (HERMES, "a <tool_call> b", [Content("a <tool_call> b")]),
        (HERMES, 'a\n<tool_call>{"name": "he', [Content('a\n<tool_call>{"name": "he')]),
        (
            HERMES,
            'a <tool_call>{"name": "heat", "arguments": {"u',
            [Content("a"), CallBegin("heat"), Arguments('{"u')],
        ),
        (HERMES, '<tool_call>{"name": "none", "arguments": {}}', [WHOLE]),
        (JSON, '{"name": "Bob"}', [Content('{"name": "Bob"}')]),
        (JSON, 'x {"name": "heat", "arguments": {}}', [WHOLE]),
        (
            LLAMA3_JSON,
            '<|python_tag|> {"name": "heat", "parameters": {}}; {"na',
            [CallBegin("heat"), Arguments("{}"), Content('; {"na')],
        ),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "heat", "arguments": {}}] ',
            [CallBegin("heat"), Arguments("{}")],
        ),
    ],
)
def test_what_only_looks_like_a_call_is_content(
    format: CallFormat, text: str, expected: list[Any]
) -> None:
    assert read(format, list(text)) == [
        Content(text) if each is WHOLE else each for each in expected
    ]


# --- grammars ---


def with_markers(*, special: bool | None) -> Tokenizer:
    """A tokenizer that has the markers of formats as tokens; None for as text only."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    if special is not None:
        tokenizer.add_tokens(
            [
                AddedToken(marker, special=special, normalized=False)
                for each in FORMATS.values()
                for marker in each.markers
            ]
        )
    tokenizer.add_special_tokens(["<other>"])
    return tokenizer


KINDS = {"text": None, "token": False, "special token": True}


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[Tokenizer, GrammarCompiler]]:
    """A tokenizer, and what compiles grammars for it."""
    tokenizer = with_markers(special=KINDS[request.param])
    compiler = GrammarCompiler(tokenizer, tokenizer.get_vocab_size(), {EOS})
    yield tokenizer, compiler
    compiler.close()


def source(grammar: str) -> GrammarSource:
    parsed = GrammarSource.parse({"grammar": grammar})
    assert parsed is not None
    return parsed


def calls_of(format: CallFormat, text: str) -> list[tuple[str, Any]]:
    """The calls of a text, whose arguments are valid."""
    made = []
    for begin, arguments in pairwise(read(format, [text])):
        if isinstance(begin, CallBegin):
            assert isinstance(arguments, Arguments), text
            value = json.loads(arguments.text)
            jsonschema.validate(value, UNITS)
            made.append((begin.function, value))
    return made


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_required_reply_is_calls_alone(
    kind: tuple[Tokenizer, GrammarCompiler], format: CallFormat
) -> None:
    tokenizer, compiler = kind
    ours, counts = TextTokenizer(tokenizer), []
    for parallel in (True, False):
        grammar = CallGrammar(format, FUNCTIONS, ours, parallel=parallel).required()
        for seed in range(5):
            text = follow(compiler, source(grammar), seed, tokenizer, most=1500)
            calls = calls_of(format, text)
            assert not any(isinstance(each, Content) for each in read(format, [text])), text
            assert parallel or len(calls) == 1
            counts.append(len(calls))
    assert min(counts) == 1
    assert max(counts) > 1


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_text_is_free_until_a_call_begins(
    kind: tuple[Tokenizer, GrammarCompiler], format: CallFormat
) -> None:
    """Then the call is whole and valid, whether its opening is one token or spelled."""
    tokenizer, compiler = kind
    ours = TextTokenizer(tokenizer)
    plain = Tokenizer.from_str(tiny_tokenizer().to_str())
    grammar = CallGrammar(format, FUNCTIONS, ours, parallel=False).or_text()
    other, opening = tokenizer.token_to_id("<other>"), ours.added_token(format.opening)
    assert other is not None
    text = 'Any {"name": "x"} <tool_ [TOOL </tool_call'
    free = [*plain.encode(text, add_special_tokens=False).ids, other, other]
    begin = f'{format.opening}{{"name": "heat"' if not format.needs_opening else format.opening
    spelled = plain.encode(begin, add_special_tokens=False).ids
    ways = [spelled] if opening is None else [spelled, [opening]]
    for seed, way in enumerate([*ways, *ways]):
        before = free if format.needs_opening else []
        said = follow(compiler, source(grammar), seed, tokenizer, 1500, [*before, *way])
        assert len(calls_of(format, said)) == 1, said
    only_text = follow(compiler, source(grammar), 7, tokenizer, len(free), free)
    assert only_text == text + "<other>" * 2
    assert follow(compiler, source(grammar), 0, tokenizer, 9, [EOS]) == ""


def test_a_reply_may_be_json_or_calls(kind: tuple[Tokenizer, GrammarCompiler]) -> None:
    tokenizer, compiler = kind
    ours = TextTokenizer(tokenizer)
    for each in (HERMES, MISTRAL):
        grammar = CallGrammar(each, FUNCTIONS, ours, parallel=True).or_json({"const": [1]})
        begin = tokenizer.encode(each.opening, add_special_tokens=False).ids
        called = follow(compiler, source(grammar), 1, tokenizer, 1500, begin)
        assert calls_of(each, called)
        bracket = tokenizer.encode("[", add_special_tokens=False).ids
        value = follow(compiler, source(grammar), 1, tokenizer, 99, bracket)
        assert json.loads(value) == [1]


# --- markers that are special tokens ---


@given(st.lists(st.sampled_from(["a", "é", "🙂", "<tool_call>", "</tool_call>"]), max_size=12))
def test_special_markers_come_back_into_the_text(words: list[str]) -> None:
    """The backend's text has none of special tokens, and may come late."""
    tokenizer = with_markers(special=True)
    ids = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    marked = TextTokenizer(tokenizer).with_markers([5], HERMES.markers)
    text, late = "", ""
    for each in ids:
        late += tokenizer.decode(each, skip_special_tokens=True)
        text += marked.append(each, late[:1])
        late = late[1:]
    assert text + marked.append([], late) == "".join(words)


# --- formats ---


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ('{{ \'<tool_call>\\n{"name": <function-name>, "arguments": <args>}\' }}', HERMES),
        ('\'<tool_call>\\n{\\"arguments\\": <args-dict>, \\"name\\": <name>}\'', HERMES),
        ("<tool_call>\\n<function=name>\\n<parameter=a>", None),
        ('Respond in the format {"name": function name, "parameters": dictionary}.', LLAMA3_JSON),
        ("{{ '[TOOL_CALLS] [' }}{{ tool_call.function | tojson }}", MISTRAL),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", None),
        ("{{ messages[0].content }}", None),
    ],
)
def test_the_format_is_that_of_the_chat_template(template: str, format: CallFormat | None) -> None:
    assert format_of_template(template) is format


def test_ids_are_as_templates_demand() -> None:
    assert {len(MISTRAL.new_id()) for _ in range(9)} == {9}
    assert MISTRAL.new_id().isalnum()
    assert HERMES.new_id().startswith("call_")


# --- requests ---


def structure(format: CallFormat | None, **fields: Any) -> Any:
    tokenizer = TextTokenizer(tiny_tokenizer())
    model = ServedModel("m", tokenizer, ChatTemplate("", {}), None, 64, 0, format)
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    return structure_of(ChatRequest.model_validate(body), model)


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


NAMED = {"type": "function", "function": {"name": "g"}}
FORMAT = {"type": "json_object"}


@pytest.mark.parametrize(
    ("format", "fields", "reason"),
    [
        (None, {"tools": [tool()]}, "not known in which format 'm' calls tools"),
        (None, {"tools": [tool()], "tool_choice": "auto"}, "--tool-call-parser"),
        (HERMES, {"tool_choice": "auto"}, "tool_choice needs tools"),
        (HERMES, {"parallel_tool_calls": False}, "parallel_tool_calls needs tools"),
        (HERMES, {"tools": [tool()], "tool_choice": NAMED}, "'g', which is not among the tools"),
        (HERMES, {"tools": [tool(), tool()]}, "two tools have the same name"),
        (HERMES, {"tools": [tool(type="array")]}, "'f' are not of the type 'object'"),
        (HERMES, {"tools": [tool(uniqueItems=True)]}, "'f': .*'uniqueItems' at # is not supported"),
        (HERMES, {"tools": [tool(enum=["a" * 65536])]}, "at most 65536 bytes"),
        (JSON, {"tools": [tool()], "response_format": FORMAT}, "cannot have a response_format"),
        (
            HERMES,
            {"tools": [tool()], "tool_choice": "required", "response_format": FORMAT},
            "has no response_format",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    format: CallFormat | None, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ApiError, match=reason):
        structure(format, **fields)


def test_tools_alone_are_auto_and_none_constrains_nothing() -> None:
    tools = [tool(description="%import of a schema", properties={"title": {"title": "T"}})]
    alone, auto = (structure(HERMES, tools=tools, **more) for more in ({}, {"tool_choice": "auto"}))
    assert alone == auto
    assert alone.format is HERMES
    assert '"title": {}' in alone.options["grammar"]
    assert "%import" not in alone.options["grammar"]
    none = structure(None, tools=tools, tool_choice="none")
    assert (none.options, none.format, none.reader()) == ({}, None, None)
    required = structure(None, tools=tools, tool_choice="required")
    assert required.format is JSON
