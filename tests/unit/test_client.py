"""Errors, retries and replay of the client without a server.

`tests/server` has the client on real ones.
"""

import pickle
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inplace.client import (
    ClientError,
    RefusedError,
    Retry,
    Sequence,
    SequenceLostError,
    UnreachableError,
)
from inplace.client.errors import may_answer, parse_error
from inplace.client.generation_progress import GenerationProgress, Piece
from inplace.client.logprobs import TokenLogprob
from inplace.client.replay import SequenceTracker
from inplace.client.requests import (
    InferRequest,
    ModelMetadata,
    SequenceRequest,
    decode_outputs,
    encode_parameters,
)
from inplace.client.servers import COOLDOWN, ServerList
from inplace.errors import Code, RequestError
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import InferenceServerException

START = (
    "inference request for sequence 7 to model 'm' must specify the START flag on the first "
    "request of the sequence"
)


def error(text: str, status: str | None = None) -> InferenceServerException:
    return InferenceServerException(text, status and f"StatusCode.{status}")


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("retryable", [False, True])
@pytest.mark.parametrize("request_id", ["r 1: x", ""])
def test_an_error_of_the_backend_is_parsed_from_its_text(
    code: Code, retryable: bool, request_id: str
) -> None:
    text = RequestError(code, "what: why\nand more", retryable=retryable).wire(
        "a sequence", request_id
    )
    for wire in (text, f"[request id: 7] {text}"):  # Triton may put words before it
        parsed = parse_error(error(wire), "a sequence", request_id)
        expected = {Code.UNKNOWN_SEQUENCE: SequenceLostError, Code.SHUTDOWN: UnreachableError}.get(
            code, RefusedError
        )
        assert type(parsed) is expected
        assert (parsed.code, parsed.retryable, parsed.sequence, parsed.request) == (
            code,
            retryable,
            "a sequence",
            request_id,
        )
        assert (parsed.message(), parsed.reason, parsed.from_backend) == (
            wire,
            "what: why\nand more",
            True,
        )


@pytest.mark.parametrize(
    ("text", "status", "kind", "code", "retryable"),
    [
        (
            "failed to connect to all addresses",
            "UNAVAILABLE",
            UnreachableError,
            "UNAVAILABLE",
            True,
        ),
        ("Deadline Exceeded", "DEADLINE_EXCEEDED", UnreachableError, "DEADLINE_EXCEEDED", True),
        ("Stub process 'm_0_0' is not healthy.", "INTERNAL", UnreachableError, "INTERNAL", True),
        ("Internal error from Core", "INTERNAL", UnreachableError, "INTERNAL", True),
        (
            "Server is stopping, scheduler for model has stopped",
            None,
            UnreachableError,
            "UNAVAILABLE",
            True,
        ),
        (START, "INVALID_ARGUMENT", SequenceLostError, "UNKNOWN_SEQUENCE", False),
        (START, None, SequenceLostError, "UNKNOWN_SEQUENCE", False),
        (
            "unexpected shape for input 'input_ids'",
            "INVALID_ARGUMENT",
            RefusedError,
            "INVALID_ARGUMENT",
            False,
        ),
        ("unexpected shape for input 'input_ids'", None, RefusedError, "REFUSED", False),
        (
            "Request for unknown model: 'nobody' is not found",
            "NOT_FOUND",
            RefusedError,
            "NOT_FOUND",
            False,
        ),
    ],
)
def test_other_errors_are_classified_by_status_and_text(
    text: str, status: str | None, kind: type[ClientError], code: str, retryable: bool
) -> None:
    parsed = parse_error(error(text, status), 7, "r")
    assert type(parsed) is kind
    assert (
        parsed.code,
        parsed.retryable,
        parsed.sequence,
        parsed.request,
        parsed.from_backend,
    ) == (
        code,
        retryable,
        7,
        "r",
        False,
    )


def test_an_error_of_another_request_of_a_stream_is_recognised() -> None:
    ours = RequestError(Code.CAPACITY, "full").wire(7, "a1")
    assert [may_answer(error(ours), request) for request in ("a1", "a", "1", "")] == [
        True,
        False,
        False,
        False,
    ]
    assert may_answer(error(RequestError(Code.CAPACITY, "full").wire(7, "")), "")
    assert [
        may_answer(error("[request id: a1] out of bounds"), request) for request in ("a1", "a")
    ] == [True, False]
    assert may_answer(error("Socket closed", "UNAVAILABLE"), "a1")


def test_a_truncated_request_id_is_still_recognised() -> None:
    long = "r" * 3000
    text = RequestError(Code.CAPACITY, "full").wire(7, long)
    assert may_answer(error(text), long)
    assert not may_answer(error(text), "other")
    assert parse_error(error(text), 7, long).reason == "full"


def test_a_response_without_outputs_is_the_error_of_a_cancelled_request() -> None:
    with pytest.raises(
        InferenceServerException, match="the server cancelled the request"
    ) as raised:
        decode_outputs(InferResult(service_pb2.ModelInferResponse(id="a1")))
    assert (
        type(parse_error(raised.value, 7, "a1")) is UnreachableError
    )  # the same step is sent again, by START, key and position


def test_an_error_keeps_its_attributes_when_it_is_pickled() -> None:
    parsed = parse_error(
        error("INPLACE-QUEUE_FULL retryable=1 sequence=7 request=r: full", "UNAVAILABLE"), 7, "r"
    )
    again = pickle.loads(pickle.dumps(parsed))
    assert type(again) is RefusedError
    assert (str(again), again.code, again.retryable, again.sequence, again.request) == (
        str(parsed),
        "QUEUE_FULL",
        True,
        7,
        "r",
    )


def test_only_retryable_errors_are_retried_after_growing_random_pauses() -> None:
    full, bad = (
        parse_error(error(f"INPLACE-X retryable={flag} sequence=7 request=r: x"), 7, "r")
        for flag in (1, 0)
    )

    def run(failure: Exception) -> list[float]:
        """The pauses between the tries of what always fails."""
        pauses: list[float] = []

        def fail() -> None:
            raise failure

        with pytest.raises(type(failure)) as raised:
            Retry(attempts=9, initial_delay=0.1, max_delay=2.0).retrying().copy(
                sleep=pauses.append
            )(fail)
        assert raised.value is failure
        return pauses

    assert run(bad) == run(ValueError()) == []
    runs = [run(full) for _ in range(200)]
    most = np.array(runs).max(axis=0)
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert most.tolist() == pytest.approx(bounds, rel=0.1)
    assert (most <= bounds).all()
    assert np.array(runs).min() < 0.1 * most.min()


def test_the_first_try_counts_and_its_time_too() -> None:
    full = parse_error(error("INPLACE-X retryable=1 sequence=7 request=r: x"), 7, "r")

    def tries(retry: Retry, failures: int, seconds: float = 0.0) -> int:
        """How often an operation runs that fails so many times, each after so many seconds."""
        ran = 0

        def operation() -> int:
            nonlocal ran
            ran += 1
            time.sleep(seconds)
            if ran <= failures:
                raise full
            return ran

        sequence: Any = SimpleNamespace(_client=SimpleNamespace(retry=retry))
        with suppress(ClientError):
            assert Sequence._retry(sequence, operation) == failures + 1
        return ran

    quick = Retry(attempts=3, initial_delay=0.001)
    assert [tries(quick, failures) for failures in (0, 1, 2, 9)] == [1, 2, 3, 3]
    assert tries(replace(quick, timeout=0.02), 1, seconds=0.03) == 1


def test_a_server_that_failed_is_the_last_choice_during_its_cooldown() -> None:
    now = [0.0]
    servers = ServerList(["a", "b", "c"], clock=lambda: now[0])
    assert [servers.choose() for _ in range(4)] == ["a", "b", "c", "a"]
    servers.mark_failed("b")
    assert {servers.choose() for _ in range(6)} == {"a", "c"}
    assert {servers.choose(avoid="a") for _ in range(6)} == {"c"}
    now[0] = 1.0
    for url in "ac":
        servers.mark_failed(url)
    assert servers.choose() == "b"  # all failed: the one that failed first
    now[0] = 1.0 + COOLDOWN
    assert {servers.choose() for _ in range(6)} == {"a", "b", "c"}
    assert ServerList(["a"]).choose(avoid="a") == "a"
    with pytest.raises(ValueError, match="at least one server"):
        ServerList([])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (3, 3),
        (True, True),
        ("k", "k"),
        (np.int64(3), 3),
        (np.float64(0.8), "0.8"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), True),
        (2**63, "9223372036854775808"),
        (-(2**63), -(2**63)),
    ],
)
def test_a_number_that_triton_does_not_take_is_sent_as_text(
    given: object, expected: object
) -> None:
    call = InferRequest(7, True, False, {}, encode_parameters({"x": given}))
    assert repr(call.arguments("m")["parameters"]) == repr({"x": expected})


@pytest.mark.parametrize("given", [None, [1], b"k", {"a": 1}])
def test_a_parameter_of_another_type_is_a_type_error_before_anything_is_sent(given: object) -> None:
    tracker = SequenceTracker(7, None, replay=True)
    request = SequenceRequest({"input_ids": np.array([1])}, parameters={"seed": given})  # type: ignore[dict-item]
    with pytest.raises(
        TypeError, match=r"parameter 'seed' is .*; expected a string, a number or a boolean"
    ):
        tracker.infer_requests(
            request,
            ModelMetadata(decoupled=True, token_inputs=frozenset({"input_ids"}), has_text=False),
        )
    assert not tracker.needs_end


MODEL = ModelMetadata(
    decoupled=True,
    token_inputs=frozenset({"input_ids"}),
    has_text=True,
    step_outputs=("next_token",),
)


@pytest.mark.parametrize(
    ("sequence_id", "key", "message"),
    [
        ("alice\0x", None, "the correlation id has a NUL byte"),
        ("a", "k\0b", "the key has a NUL byte, at which Triton would cut it"),
        ("", None, "the correlation id has 0 bytes; expected 1 to 128"),
        ("é" * 65, None, "the correlation id has 130 bytes"),
        (0, None, r"the correlation id is 0; expected an integer from 1 to 2\^63 - 1"),
        (-5, None, "the correlation id is -5"),
        (2**63, None, "the correlation id is 9223372036854775808"),
    ],
)
def test_an_id_or_key_that_triton_would_change_is_refused(
    sequence_id: int | str, key: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceTracker(sequence_id, key, replay=True)


def test_a_request_id_with_a_nul_byte_is_refused() -> None:
    request = SequenceRequest({"input_ids": np.array([1])}, request_id="r\0")
    with pytest.raises(ValueError, match="the request id has a NUL byte"):
        SequenceTracker("a", None, replay=True).infer_requests(request, MODEL)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temprature": 1}, "'temprature' is unknown, did you mean 'temperature'?"),
        ({"restore": "a"}, "parameter 'restore' is 'a'; expected true or false"),
        ({"top_p": 2.0}, "parameter 'top_p' is '2.0'; expected a number above 0, at most 1"),
        ({"ignore_eos": True}, "belongs to generations"),
        ({"group": "a\0b"}, "without a NUL byte"),
    ],
)
def test_a_parameter_that_the_server_would_refuse_is_not_sent(
    parameters: dict[str, str | int | float], message: str
) -> None:
    request = SequenceRequest({"input_ids": np.array([1])}, parameters=parameters, request_id="r")
    tracker = SequenceTracker(7, None, replay=True)
    with pytest.raises(RefusedError) as refused:
        tracker.infer_requests(request, MODEL)
    assert (refused.value.code, refused.value.retryable) == ("BAD_PARAMETER", False)
    assert (refused.value.sequence, refused.value.request) == (7, "r")
    assert message in refused.value.reason
    assert not tracker.needs_end


@pytest.mark.parametrize("given", [[2, 13], (2, 13), np.array([2, 13]), "2,13"])
def test_stop_token_ids_are_sent_as_a_text(given: object) -> None:
    assert encode_parameters({"stop_token_ids": given}) == {"stop_token_ids": "2,13"}
    assert encode_parameters({"stop_token_ids": []}) == {}


def test_a_step_that_names_no_outputs_asks_for_all_but_the_logits() -> None:
    def outputs(**parameters: bool) -> tuple[str, ...]:
        request = SequenceRequest({"input_ids": np.array([1])}, parameters=parameters)
        return SequenceTracker(7, None, replay=True).infer_requests(request, MODEL)[0].outputs

    assert outputs() == ("next_token",)
    assert outputs(logits=True) == ("next_token", "logits")


def test_generations_carry_the_group_of_their_client() -> None:
    tracker = SequenceTracker(7, None, replay=True, group="mine")
    inputs = {"input_ids": np.array([1])}
    step = SequenceRequest(inputs)
    assert "group" not in tracker.infer_requests(step, MODEL)[0].parameters
    for given, expected in (({}, "mine"), ({"group": "other"}, "other")):
        request = SequenceRequest(inputs, parameters={"max_tokens": 3, **given})
        assert tracker.infer_requests(request, MODEL)[0].parameters["group"] == expected


def sent(tracker: SequenceTracker, ids: list[int]) -> list[InferRequest]:
    """The requests that feed these tokens, recorded as answered."""
    step = SequenceRequest({"input_ids": np.array(ids)})
    requests = tracker.infer_requests(step, MODEL)
    for request in requests:
        tracker.sending(request, MODEL)
    tracker.answered(step, MODEL)
    return requests


def test_a_copy_begins_on_the_server_while_its_source_is_unchanged_and_else_by_a_replay() -> None:
    source = SequenceTracker("first", None, replay=True)
    sent(source, [1, 2])
    copies = [source.fork(f"copy {index}") for index in range(3)]
    [request] = sent(copies[0], [3])
    assert (request.start, request.sequence_id) == (True, "copy 0")
    assert request.parameters == {"sequence_key": source.key, "position": 2, "from": "first"}
    assert request.headers == {"inplace-sequence": "first"}
    assert (copies[0].length, copies[0].key) == (3, source.key)
    [later] = sent(copies[0], [4])
    assert (later.start, later.parameters["position"]) == (False, 3)
    assert later.headers == request.headers
    sent(source, [5])
    [replay] = sent(copies[1], [3])
    assert replay.inputs["input_ids"].tolist() == [1, 2, 3]
    assert (replay.start, replay.parameters["position"]) == (True, 0)
    source.reset()
    [replay] = sent(copies[2], [4])
    assert replay.inputs["input_ids"].tolist() == [1, 2, 4]
    assert source.fork(None).infer_requests(SequenceRequest({}), MODEL)[0].parameters.keys() == {
        "sequence_key",
        "position",
    }


def test_a_copy_whose_source_the_server_has_lost_is_replayed_or_lost() -> None:
    for replay in (True, False):
        source = SequenceTracker("first", None, replay)
        sent(source, [1, 2])
        copy = source.fork(None)
        assert copy.movable is replay
        step = SequenceRequest({"input_ids": np.array([3])})
        [request] = copy.infer_requests(step, MODEL)
        error = copy.failed(error_of(Code.UNKNOWN_SEQUENCE), request)
        assert error.retryable is replay
        if replay:
            [request] = copy.infer_requests(step, MODEL)
            assert request.inputs["input_ids"].tolist() == [1, 2, 3]
        else:
            assert isinstance(error, SequenceLostError)
            sent(source, [5])
            with pytest.raises(SequenceLostError, match="has had another request"):
                copy.infer_requests(step, MODEL)


def test_a_copy_is_tried_again_where_its_source_is_busy_or_no_slot_is_free() -> None:
    source = SequenceTracker("first", None, replay=True)
    sent(source, [1, 2])
    copy, step = source.fork(None), SequenceRequest({"input_ids": np.array([3])})
    for code in (Code.SEQUENCE_BUSY, Code.NO_FREE_SLOT):
        [request] = copy.infer_requests(step, MODEL)
        assert copy.failed(error_of(code, retryable=True), request).retryable
        assert request.parameters["from"] == "first"


def test_a_replay_has_the_cache_salt_of_the_sequence_or_of_the_one_it_copied() -> None:
    first = SequenceTracker("first", "key", replay=True)
    with pytest.raises(RefusedError, match="expected a text"):
        first.infer_requests(SequenceRequest({}, parameters={"cache_salt": ""}), MODEL)
    [request] = first.infer_requests(SequenceRequest({}), MODEL)
    assert "cache_salt" not in request.parameters
    step = SequenceRequest({"input_ids": np.array([1])}, parameters={"cache_salt": "user"})
    for _ in range(2):  # it is tried again
        [request] = first.infer_requests(step, MODEL)
        assert request.parameters["cache_salt"] == "user"
    first.answered(step, MODEL)
    copy = first.fork("copy")
    [request] = copy.infer_requests(SequenceRequest({"input_ids": np.array([2])}), MODEL)
    assert "cache_salt" not in request.parameters
    [later] = sent(first, [3])
    assert "cache_salt" not in later.parameters
    first.replay_next()
    for tracker, tokens in ((first, [1, 3, 4]), (copy, [1, 4])):
        [replay] = sent(tracker, [4])
        assert (replay.start, replay.inputs["input_ids"].tolist()) == (True, tokens)
        assert replay.parameters["cache_salt"] == "user"
    first.reset()
    [fresh] = sent(first, [1])
    assert "cache_salt" not in fresh.parameters


def test_a_text_that_a_replay_sends_first_has_the_cache_salt() -> None:
    tracker = SequenceTracker("first", "key", replay=True)
    text = SequenceRequest({"text": np.array([b"a"])}, parameters={"cache_salt": 7})
    requests = tracker.infer_requests(text, MODEL, ["b"])
    assert [request.parameters.get("cache_salt") for request in requests] == [7, None]


@pytest.mark.parametrize(("key", "id"), [("", None), (None, "first")])
def test_a_sequence_without_a_key_or_another_id_has_no_copies(
    key: str | None, id: str | None
) -> None:
    with pytest.raises(ValueError, match="cannot be copied" if key == "" else "id of its own"):
        SequenceTracker("first", key, replay=True).fork(id)


def error_of(code: Code, *, retryable: bool = False) -> ClientError:
    text = RequestError(code, "reason", retryable=retryable).wire("copy", "r")
    return parse_error(InferenceServerException(text), "copy", "r")


def response(
    tokens: list[int], text: str | None = None, reason: str = ""
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    outputs = {
        "tokens": np.array(tokens),
        "finish_reason": np.array([reason.encode()], dtype=object),
    }
    return (
        outputs
        if text is None
        else outputs | {"text_output": np.array([text.encode()], dtype=object)}
    )


def progress_of(**inputs: object) -> GenerationProgress:
    made = {
        name: np.array(
            value if name == "input_ids" else [value], dtype=None if name == "input_ids" else object
        )
        for name, value in inputs.items()
    }
    return GenerationProgress(SequenceRequest(made, parameters={"max_tokens": 6, "seed": 3}))


def test_generated_tokens_are_part_of_the_prompt_on_the_next_server() -> None:
    progress = progress_of(input_ids=[1, 2])
    assert progress.begin()[1] is progress.request
    progress.add_response(response([3]))
    progress.add_response(response([4, 5]))
    prefix, request = progress.begin()
    assert (prefix, request.segment, request.parameters["max_tokens"]) == ([], [1, 2, 3, 4, 5], 3)
    last = response([6, 7, 8], reason="length") | {"reused_tokens": np.array([[4]])}
    assert progress.add_response(last).tokens == [6, 7, 8]
    assert progress.tokens == [3, 4, 5, 6, 7, 8]
    assert progress.reused_tokens == 2  # of the four, two were generated


def test_text_is_neither_lost_nor_repeated() -> None:
    progress = progress_of(text=b"once")
    progress.begin()
    for token, text in ((3, "a"), (4, "b"), (5, "")):  # the last is half a character
        progress.add_response(response([token], text))
    prefix, request = progress.begin()
    assert (prefix, request.segment, request.parameters["max_tokens"]) == (
        ["once"],
        [3],
        5,
    )  # not 4: it may have begun the character that 5 goes on with
    assert progress.add_response(response([4], "b")) == Piece([], "", "")
    assert progress.add_response(response([5, 6], "\N{GRINNING FACE}")) == Piece(
        [6], "\N{GRINNING FACE}", ""
    )
    assert progress.add_response(response([7, 8], "xyz", "length")) == Piece(
        [7, 8], "xyz", "length"
    )
    assert (progress.tokens, progress.text) == ([3, 4, 5, 6, 7, 8], "ab\N{GRINNING FACE}xyz")


def test_a_prompt_that_ends_within_a_character_is_noticed_and_the_replay_begins_anew() -> None:
    progress = progress_of(input_ids=[1])
    progress.begin()
    for token, text in (
        (3, "a"),
        (4, " "),
        (5, "\N{EURO SIGN}"),
    ):  # 4 is a space and the first byte of the sign
        progress.add_response(response([token], text))
    assert progress.begin()[1].segment == [1, 3, 4]
    with pytest.raises(RefusedError) as differs:
        progress.add_response(response([5], ""))
    assert (differs.value.code, differs.value.retryable) == ("REPLAY", True)
    assert progress.begin() == ([], progress.request)
    assert progress.add_response(response([3, 4, 5, 6], "a \N{EURO SIGN}x")) == Piece([6], "x", "")


def test_with_stop_texts_everything_is_generated_again_and_compared() -> None:
    progress = progress_of(input_ids=[1], stop=b"END")
    progress.begin()
    progress.add_response(response([3], "a"))
    progress.add_response(response([4], "bc"))
    assert progress.begin() == ([], progress.request)
    assert progress.add_response(response([3, 4, 5], "abcd")).text == "d"
    progress.begin()
    with pytest.raises(
        RefusedError, match=r"the replay generated \[9\] instead of \[3\]"
    ) as refused:
        progress.add_response(response([9], "z"))
    assert (refused.value.code, refused.value.retryable) == ("REPLAY", False)


def test_the_client_needs_no_pytorch() -> None:
    code = "import inplace.client, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_rest_of_a_generation_counts_the_tokens_that_it_has_in_its_prompt() -> None:
    parameters = {
        "max_tokens": 6,
        "min_tokens": 3,
        "presence_penalty": 0.5,
        "num_generated": 1,
        "logprobs": 1,
    }
    request = SequenceRequest({"input_ids": np.array([1, 2])}, parameters=parameters)
    progress = GenerationProgress(request)
    outputs = {
        "tokens": np.array([7, 8]),
        "token_logprobs": np.array([-0.5, -1.5], dtype=np.float32),
        "top_tokens": np.array([[7], [9]]),
        "top_logprobs": np.array([[-0.5], [-0.25]], dtype=np.float32),
    }
    piece = progress.add_response(outputs)
    assert piece.logprobs == (
        TokenLogprob(7, -0.5, ((7, -0.5),)),
        TokenLogprob(8, -1.5, ((9, -0.25),)),
    )
    _, rest = progress.begin()
    assert rest.inputs["input_ids"].tolist() == [1, 2, 7, 8]
    assert rest.parameters == parameters | {"max_tokens": 4, "min_tokens": 1, "num_generated": 3}
    assert progress.begin()[1].parameters == rest.parameters


def test_biases_and_token_ids_are_sent_as_texts() -> None:
    assert encode_parameters(
        {"logit_bias": {7: 2, 9: -4.5}, "allowed_token_ids": [1, 2], "banned_token_ids": ()}
    ) == {"logit_bias": "7:2.0,9:-4.5", "allowed_token_ids": "1,2"}
    with pytest.raises(TypeError, match="parameter 'seed' is"):
        encode_parameters({"seed": {1: 2}})
    # no token allowed is not the same as all of them: the server refuses the empty text
    assert encode_parameters({"allowed_token_ids": []}) == {"allowed_token_ids": ""}
    for given in ({"stop_token_ids": [1.5]}, {"logit_bias": {1.5: 2.0}}):
        with pytest.raises(TypeError, match=r"is [\[{]1\.5"):
            encode_parameters(given)
