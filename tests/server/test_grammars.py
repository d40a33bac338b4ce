"""Structured output of a real tritonserver, through the client and the generate proxy."""

import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema  # type: ignore[import-untyped]
import pytest
from inplace.client import Client, Generation, RefusedError, Sequence
from support.served import MODEL, Served

pytestmark = pytest.mark.server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 22, None]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EXPENSIVE = {
    "type": "object",
    "properties": {f"p{index}": {"type": "string"} for index in range(1900)},
}


def finished(generation: Generation) -> tuple[str, str | None]:
    """The text of a generation, and why it ended."""
    pieces = list(generation)
    return "".join(piece.text for piece in pieces), pieces[-1].finish_reason


def test_clients_get_what_their_grammar_allows(served: Served) -> None:
    with Client(served.server.grpc_url) as client:
        with Sequence(client, MODEL) as sequence:
            text, _ = finished(sequence.generate([5, 6], 200, json=SCHEMA, temperature=1.0))
            jsonschema.validate(json.loads(text), SCHEMA)
        with Sequence(client, MODEL) as sequence:
            text, reason = finished(sequence.generate([5, 6], 20, choice=["yes", "no"]))
            assert text in ("yes", "no")
            assert reason == "stop"
            with pytest.raises(RefusedError, match="the keyword 'not' at # is not supported"):
                finished(sequence.generate([7], 5, json={"not": {}}))
    events = served.events(input_ids=[5, 6], max_tokens=90, regex="(ab){3}")
    assert "".join(event["text_output"] for event in events) == "ababab"


def test_a_grammar_that_is_too_expensive_delays_nobody(served: Served) -> None:
    def expensive() -> str:
        with Client(served.server.grpc_url) as client, Sequence(client, MODEL) as sequence:
            try:
                finished(sequence.generate([5], 5, json=EXPENSIVE))
            except RefusedError as error:
                return str(error)
        return ""

    answered = 0
    with ThreadPoolExecutor(1) as pool, Client(served.server.grpc_url) as client:
        refused = pool.submit(expensive)
        while not refused.done():
            with Sequence(client, MODEL) as sequence:
                finished(sequence.generate([5], 4, ignore_eos=True, end=True))
            answered += 1
    assert "the grammar" in refused.result()
    assert answered > 2
