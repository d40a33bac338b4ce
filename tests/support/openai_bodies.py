"""Random bodies for the OpenAI front end: valid ones with parts replaced, and no JSON at all."""

import json
from typing import Any

from hypothesis import strategies as st
from inplace.openai.schemas import ChatRequest, CompletionRequest

from support.fronts import Front
from support.served import MODEL

TEXTS = st.text(max_size=12) | st.sampled_from(["</s>", "<s>", "user", "\ufdd0", "\x00", "🙂" * 9])
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-2, 9) | st.floats(width=32)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 60),
    "min_p": st.floats(0, 1),
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "seed": st.integers(),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "min_tokens": st.integers(0, 5),
    "top_logprobs": st.integers(0, 4),
    "stop_token_ids": st.lists(st.integers(0, 255), max_size=3),
    "ignore_eos": st.booleans(),
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | TEXTS, "content": TEXTS}
    ),
    max_size=3,
)
PROMPTS = (
    TEXTS
    | st.lists(st.integers(-1, 300), max_size=5)
    | st.lists(TEXTS, max_size=3)
    | st.lists(st.lists(st.integers(0, 255), max_size=3), max_size=3)
)


def _bodies(fields: list[str], valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    names = st.sampled_from(fields)
    plausible = names.flatmap(lambda name: st.tuples(st.just(name), PLAUSIBLE.get(name, VALUES)))
    wrong = st.tuples(names | TEXTS, VALUES)
    changes = st.lists(plausible, max_size=4).flatmap(
        lambda some: st.lists(wrong, max_size=1).map(lambda more: dict(some + more))
    )
    made = st.fixed_dictionaries({"max_tokens": st.integers(1, 4)} | valid)
    return st.tuples(made, changes).map(lambda both: json.dumps(both[0] | both[1]).encode())


REQUESTS = st.one_of(
    st.tuples(
        st.just("/v1/chat/completions"),
        _bodies([*ChatRequest.model_fields], {"model": st.just(MODEL), "messages": MESSAGES}),
    ),
    st.tuples(
        st.just("/v1/completions"),
        _bodies([*CompletionRequest.model_fields], {"model": st.just(MODEL), "prompt": PROMPTS}),
    ),
    st.tuples(st.sampled_from(["/v1/completions", "/v1/chat/completions"]), st.binary()),
)
"""A path and a body."""


def check_answer(front: Front, path: str, body: bytes) -> int:
    """Send a body; the answer must be a result or one of OpenAI's errors. Returns the status."""
    status, _, answer = front.send(path, body)
    check(status, answer)
    return status


def check(status: int, answer: Any, *, may_be_full: bool = False) -> None:
    """An answer must be a result or one of OpenAI's errors.

    Args:
        status: its own.
        answer: its JSON; the text of a stream.
        may_be_full: whether the server may have no room for the request.
    """
    if isinstance(answer, str):  # a stream
        *events, last = answer.removesuffix("\n\n").split("\n\n")
        bodies = [json.loads(each.removeprefix("data: ")) for each in events]
        assert status == 200, answer
        assert last == "data: [DONE]" or "error" in json.loads(last.removeprefix("data: ")), answer
        assert all(each["choices"] or each["usage"] for each in bodies)
    elif status == 200:
        reasons = {choice["finish_reason"] for choice in answer["choices"]}
        assert reasons <= {"stop", "length", "tool_calls"}
    else:
        assert status in (400, 404, 413) or (may_be_full and status == 503), answer
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert answer["error"]["message"]
