"""Grammars without a model: what is refused, what processes answer, what they may cost."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import psutil
import pytest
from inplace.errors import Code, RequestError
from inplace.grammars import (
    MAX_GENERATED,
    GrammarCompiler,
    GrammarSource,
    service,
    wait_for_masks,
)
from inplace.grammars.source import check_schema
from inplace.parameters import RequestKind, parse_parameters
from support.matching import EOS, follow
from support.models import VOCABULARY
from support.vocabulary import byte_fallback, tiny_tokenizer, word_piece
from tokenizers import Tokenizer, decoders

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, VOCABULARY, {EOS})
    yield made
    made.close()


def source(**parameters: object) -> GrammarSource:
    parsed = GrammarSource.parse(parameters)
    assert parsed is not None
    return parsed


# --- what texts are possible ---


@pytest.mark.parametrize(
    "regex", [r"(ab|[0-9]{2,4}){2}x", r"\d{3}-[a-z]{1,5}", "(\u00e9|\u4e2d\u6587){1,3}!", "[^a]?"]
)
def test_a_text_matches_the_expression_as_a_whole(compiler: GrammarCompiler, regex: str) -> None:
    texts = [follow(compiler, source(regex=regex), seed) for seed in range(4)]
    assert all(re.fullmatch(regex, text) for text in texts), texts


def test_a_text_is_one_of_the_choices(compiler: GrammarCompiler) -> None:
    choices = ["red", "reddish", 'a "b"\n\\', "\u4e2d\u6587", "%json"]
    given = source(choice=json.dumps(choices))
    assert {follow(compiler, given, seed) for seed in range(40)} == set(choices)


def test_tokens_that_are_bytes_follow_grammars_too() -> None:
    tokenizer = byte_fallback()
    compiler = GrammarCompiler(tokenizer, tokenizer.get_vocab_size(), {EOS})
    given = source(regex="(\u4e2d|\u00e9| ab){3}")
    texts = [follow(compiler, given, seed, tokenizer) for seed in range(3)]
    compiler.close()
    assert all(re.fullmatch("(\u4e2d|\u00e9| ?ab)(\u4e2d|\u00e9| ab){2}", each) for each in texts)


def test_byte_level_tokens_are_bytes_behind_other_decoders_too() -> None:
    """As transformers makes tokenizers from GGUF files."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    replaces = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), replaces, decoders.ByteLevel()]
    )
    compiler = GrammarCompiler(tokenizer, VOCABULARY, {EOS})
    expression = "( the|\n\u00e9){3}"
    texts = [follow(compiler, source(regex=expression), seed, tokenizer) for seed in range(3)]
    compiler.close()
    assert all(re.fullmatch(expression, text) for text in texts), texts


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    compiler = GrammarCompiler(word_piece(), 120, set())
    error = compiler.compile(source(regex="a")).exception(60)
    compiler.close()
    assert isinstance(error, RequestError)
    assert "the tokenizer of this model is not one of bytes" in str(error)


def test_end_tokens_that_the_model_does_not_have_are_left_out(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(source(regex="a?")).result(60).matcher({EOS, VOCABULARY + 99})
    matcher.advance([])
    assert wait_for_masks([matcher], 30) == [matcher]
    following = matcher.receive()
    matcher.close()
    assert following.may_end
    assert following.mask is not None
    assert following.mask[0] >> EOS & 1


def test_a_long_text_that_was_generated_before_is_followed_at_once(
    compiler: GrammarCompiler,
) -> None:
    matcher = compiler.compile(source(regex="a+")).result(60).matcher({EOS})
    matcher.advance(TOKENIZER.encode("a", add_special_tokens=False).ids * MAX_GENERATED)
    assert wait_for_masks([matcher], 30) == [matcher]
    following = matcher.receive()
    matcher.close()
    assert following.may_end, following.error


def test_a_schema_that_refers_to_itself_is_followed(compiler: GrammarCompiler) -> None:
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    for seed in range(4):
        text = follow(compiler, source(json=json.dumps(schema)), seed)
        jsonschema.validate(json.loads(text), schema)


# --- what is refused before anything is compiled ---


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems' at # is not supported"),
        ({"items": {"not": {}}}, "the keyword 'not' at #/items is not supported"),
        ({"properties": {"a": {"nullable": True}}}, "'nullable' at #/properties/a is not"),
        ({"x-guidance": {"lenient": True}}, "the keyword 'x-guidance'"),
        ({"$ref": "http://host/schema"}, "only references into the same schema are supported"),
        ({"$ref": "#/$defs/a"}, "'#/$defs/a', which is not in the schema"),
        ({"anyOf": {}}, "#/anyOf is dict; expected an array of schemas"),
        ({"items": 5}, "#/items is int; expected an object or a boolean"),
        ({"allOf": [{}] * 5000}, "it has more than 4000 schemas"),
    ],
)
def test_schemas_are_refused_with_the_keyword_and_its_place(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as refused:
        check_schema(schema)
    assert refused.value.code is Code.BAD_PARAMETER


def test_schemas_and_references_that_lie_too_deep_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(65):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="lie in each other more than 64 deep"):
        check_schema(deep)
    links = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(33)}
    with pytest.raises(RequestError, match=r"more than 32 '\$ref' follow each other"):
        check_schema({"$ref": "#/$defs/d0", "$defs": {**links, "d33": {}}})
    check_schema({"$ref": "#/$defs/d20", "$defs": {**links, "d33": {}}})


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"json": "{"}, "expected a JSON schema"),
        ({"json": "[1]"}, "expected a JSON schema"),
        ({"json": '{"const": NaN}'}, "expected a JSON schema"),
        ({"json": '{"const": ' + "[" * 9999 + "]" * 9999 + "}"}, "expected a JSON schema"),
        ({"regex": ""}, "expected an expression of at most 65536 bytes"),
        ({"regex": "\u00e9" * 40000}, "expected an expression of at most 65536 bytes"),
        ({"choice": '["a", "a"]'}, "1 to 1024 different texts"),
        ({"choice": "a,b"}, "the text of a JSON array"),
        ({"choice": '["\\ud800"]'}, "without NUL characters or halves of surrogate pairs"),
        ({"json": '{"const": "\\ud800"}'}, "without halves of surrogate pairs"),
        ({"regex": "\ud800"}, "bytes of UTF-8"),
        (
            {"grammar": 'start: %json {"not": {}}'},
            "the JSON schema is not usable: the keyword 'not' at # is not supported",
        ),
        ({"grammar": "start: %json word"}, "has no JSON schema behind '%json' at 7"),
        ({"grammar": "%import common.INT"}, "has '%import', which is not supported"),
        ({"regex": "a", "json_object": True}, "['json_object', 'regex'] exclude each other"),
    ],
)
def test_parameters_that_are_no_grammar_are_refused(
    parameters: dict[str, object], reason: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as refused:
        GrammarSource.parse(parameters)
    assert refused.value.code is Code.BAD_PARAMETER


def test_grammars_are_for_generations() -> None:
    assert GrammarSource.parse({"json_object": False}) is None
    parse_parameters({"regex": "a"}, RequestKind.GENERATION)
    parse_parameters({"choice": '["a"]'}, RequestKind.PROXY)
    with pytest.raises(RequestError, match="'regex' belongs to generations"):
        parse_parameters({"regex": "a"}, RequestKind.STEP)


# --- what the processes refuse ---


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": 'start: %json {"const": "\\ud800"}'}, "hex escape"),
        ({"grammar": "start: " + "|".join(["%json{}"] * 8000)}, "bytes .* use fewer schemas"),
        ({"json": '{"type": "string", "format": "postcode"}'}, "Unknown format: postcode"),
        ({"json": '{"oneOf": [{"type": "string"}, {"minLength": 2}]}'}, "oneOf"),
        ({"json": '{"minimum": 3, "maximum": 2, "type": "integer"}'}, "minimum"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, parameters: dict[str, str], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        compiler.compile(source(**parameters)).result(60)
    assert refused.value.code is Code.BAD_PARAMETER
    assert follow(compiler, source(regex="ok")) == "ok", "other grammars are not affected"


@pytest.mark.parametrize(("limit", "value"), [("COMPILE_SECONDS", 0.02), ("MEMORY_MEGABYTES", 1)])
def test_a_grammar_that_needs_too_much_ends_its_own_process_alone(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(service, limit, value)
    limited = GrammarCompiler(TOKENIZER, VOCABULARY, {EOS})
    properties = {f"p{index}": {"type": "string"} for index in range(1500)}
    large = source(json=json.dumps({"type": "object", "properties": properties}))
    error = limited.compile(large).exception(60)
    text = follow(limited, source(regex="ok"))
    limited.close()
    assert isinstance(error, RequestError)
    assert (error.code, error.retryable) == (Code.BAD_PARAMETER, False)
    assert re.match("the grammar took more than .* to be compiled: simplify it", str(error))
    assert text == "ok"


def test_a_compiled_grammar_is_kept_and_one_whose_process_died_is_not(
    compiler: GrammarCompiler,
) -> None:
    given = source(regex="kept")
    first = compiler.compile(given)
    assert compiler.compile(given) is first
    assert follow(compiler, given) == "kept"
    first.result().close()
    assert compiler.compile(given) is not first
    assert follow(compiler, given) == "kept"


def test_a_generation_that_is_closed_before_its_mask_is_read_ends_alone(
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile(source(regex="[0-9]+")).result(60)
    other, closed = grammar.matcher({EOS}), grammar.matcher({EOS})
    closed.advance([])
    assert wait_for_masks([closed], 30) == [closed]
    closed.close()  # as a generation that is cancelled
    other.advance([])
    assert wait_for_masks([other], 30) == [other]
    following = other.receive()
    other.close()
    assert following.mask is not None, following.error
    assert grammar.is_alive


def test_more_grammars_than_may_wait_are_refused_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_WAITING", 1)
    busy = GrammarCompiler(TOKENIZER, VOCABULARY, {EOS})
    futures = [busy.compile(source(regex=f"a{{{index}}}")) for index in range(1, 6)]
    refused = [each.exception(60) for each in futures[3:]]
    busy.close()
    for error in refused:
        assert isinstance(error, RequestError)
        assert (error.code, error.retryable) == (Code.QUEUE_FULL, True)


def test_a_process_that_could_not_be_reached_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "START_SECONDS", 1e-3)
    late = GrammarCompiler(TOKENIZER, VOCABULARY, {EOS})
    with pytest.raises(OSError, match="does not start"):
        late.compile(source(regex="ok")).result(60)
    monkeypatch.undo()
    text = follow(late, source(regex="ok"))
    late.close()
    assert text == "ok"


def test_the_processes_end_with_the_compiler() -> None:
    ended = GrammarCompiler(TOKENIZER, VOCABULARY, {EOS})
    matcher = ended.compile(source(regex="a+")).result(60).matcher({EOS})
    assert ended._process is not None
    children = psutil.Process(ended._process.pid).children()
    assert len(children) == 1
    ended.close()
    assert ended._process.poll() is not None
    assert children[0].is_running(), "a generation still has it"
    matcher.close()
    _, left = psutil.wait_procs(children, timeout=60)
    assert left == []
